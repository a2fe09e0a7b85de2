"""The inline guard: what a receiver asks of every tensor before it uses it. It sees single tensors, not their inputs.

The paper's check on the statistics of `verifier.features`; how well the tensor agrees with the tokens that it belongs
to, which tells that it is another's, or was turned round, or is noise; and of activations how well they agree with the
stream in what its channels have in common, which tells signs that were changed, and noise that was added. All of it
at a few places that the receiver draws by itself and tells nobody: a corruption of the whole tensor shows there as well
as anywhere, and looking at every element of every tensor would cost more than the check is worth. When a stage has
worked, nothing of this is in a cache any more, so what costs is how many different operations there are: a few of
NumPy's again and again, by the shortest way into the library (`dot`, not `@`), and plain floats where there are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verifier import features
from verifier.baseline import Centring, Recent
from verifier.by_token import ByToken
from verifier.senders import Apart, Latest, Sums
from verifier.streams import Direction, Peer

_Seen: TypeAlias = npt.NDArray[np.float32]
Tokens: TypeAlias = Sequence[int] | memoryview

_ELEMENTS = 2048
_FEWEST_PLACES = 4
_MOST_CHANNELS = 128
_ONE = np.float32(1)
_ROUNDING = 1e-5
"""Of a projection: what may tell equal tokens apart."""
# Learning costs as much as looking. What is usual of measures it learns from every tensor while it is young, then from
# every fourth; means and moments, which change slowly and cost most, from every one only at the very beginning, then
# from every eighth.
_YOUNG, _LEARNS_EVERY = 64, 4
_NEWBORN, _LEARNS_TENSORS_EVERY = 32, 8
_LEARNS_TOGETHER = 4
"""Of what is usual of distances: to learn from four of them costs as much as from one."""
# Each time that they are learned: of means the paper's, per step of eight replicas.
_MEANS_KEPT = {Direction.ACTIVATION: 0.9 ** (1 / 4), Direction.GRADIENT: 0.8 ** (1 / 4)}
_MOMENTS_KEPT = 0.9
_FINEST = (0.05, 0.1)
"""Of what a tensor agrees by, as in `_Measures`: less than that is no difference."""
_LEAST_AGREEMENT, _FAR_OFF = {Direction.ACTIVATION: 0.25, Direction.GRADIENT: 0.5}, 4.5
"""Of what is usual with tokens, and standard deviations: a tensor that has less than that of it, and is far off, is
refused alone. Noise and another text's have none of it, three signs of ten changed leave two fifths of a gradient's. Of
honest activations, when weights jump, as little may be left for a moment."""
_DISAGREEMENT_ALLOWED = 3.0
"""Standard deviations each time: what honest texts disagree by has a heavy tail."""
# What honest gradients do: in training their sizes change severalfold within a few microbatches, all at once. In logs,
# so that three sizes have to be off by a factor of eight between them. Signs have no size.
_FLOORS = {Direction.ACTIVATION: None, Direction.GRADIENT: np.array([0.3, 0.3, 0.0, 0.3])}


class Guard:
    """Of one receiver and one direction. `check` every tensor that arrives; what passes, it learns from.

    `limit` is in robust standard deviations (`Settings.guard`). What is flagged is not learned from; but if more than
    half of the peers that sent the latest tensors are flagged, then it is the stream that has changed, and the
    baseline starts anew: a receiver that refuses everybody would end the run. So it does where nothing has come for
    longer than all that is remembered took to come: the weights have moved on meanwhile.
    """

    def __init__(self, direction: Direction, generator: np.random.Generator, limit: float = 6.0) -> None:
        self._direction, self._generator, self._limit = direction, generator, limit
        self._mean: _Seen | None = None
        self._moments: _Seen | None = None
        self._centring = Centring(len(features.MARGINAL), _FLOORS[direction])
        self._by_token: ByToken | None = None
        self._agreement = (Recent(), Recent())
        self._disagreement = Sums(_DISAGREEMENT_ALLOWED, limit)
        self._apart = Apart()
        self._latest = Latest()
        self._places: Tensor | None = None
        self._seen = torch.zeros(0)
        """(B, P, W) what is looked at, in memory of its own, which NumPy knows already."""
        self._vectors: _Seen = self._seen.numpy()
        self._label_places: list[int] = []
        self._channels: npt.NDArray[np.int64] | None = None
        self._to_learn: list[list[float]] = []
        self._usual: _Usual | None = None
        self._scales: tuple[list[float], list[float]] | None = None
        self.checked = self.flagged = 0

    def check(self, tensor: Tensor, sender: Peer, labels: Tokens | None = None, *, version: int = 0) -> bool:
        """Whether a tensor (B, T, W), T >= 2, of the shape of the first, any floating dtype, on any device, without a
        graph, may be used. `labels` (B x T,): the token after each place; without them nothing is compared with tokens.
        `version`: of the receiver's weights."""
        if self._latest.are_outdated(version):
            self._start_anew()
        vectors = self._look(tensor)
        tokens = None if labels is None else [labels[place] for place in self._label_places]
        values = self._measure(vectors, tokens)
        is_odd = values is None or self._is_odd(values, sender)
        if values is not None and not is_odd:
            if self.checked < _YOUNG or self.checked % _LEARNS_EVERY == 0:
                self._learn(values)
            if self.checked < _NEWBORN or self.checked % _LEARNS_TENSORS_EVERY == 0:
                self._learn_tensor(vectors, tokens)
        self.checked += 1
        self.flagged += is_odd
        if self._latest.note(sender, is_odd, version):
            self._start_anew()
        return not is_odd

    def hears_only(self, sender: Peer) -> bool:
        """Whether nobody else has sent anything of late."""
        return self._latest.are_all_of(sender)

    def _start_anew(self) -> None:
        self._latest.clear()
        self._apart.clear()
        self._disagreement.clear()
        for one in self._agreement:
            one.clear()
        self._centring.restart()
        self._to_learn.clear()
        self._scales = None

    def _is_odd(self, values: _Measures, sender: Peer) -> bool:
        deviations = map(Recent.deviation, self._agreement, values.agreement, _FINEST)
        deviation = self._apart.beyond(sender, -min(deviations))
        if self._disagreement.add(sender, deviation):
            return True
        is_far_off = (
            deviation > _FAR_OFF
            and values.agreement[0] < _LEAST_AGREEMENT[self._direction] * self._agreement[0].expected
        )
        # Where there is nobody to compare its sender with, it may as well be the stream that changes.
        if is_far_off and not self.hears_only(sender):
            return True
        if self._scales is None:
            self._scales = self._centring.scales()
        if self._scales is None:
            return False
        residuals = (
            (value - centre) / scale
            for value, centre, scale in zip(values.distances, *self._scales, strict=True)
        )
        return math.hypot(*residuals) > self._limit * math.sqrt(len(features.MARGINAL))

    def _learn(self, values: _Measures) -> None:
        for usual, value in zip(self._agreement, values.agreement, strict=True):
            usual.learn(value)
        self._to_learn.append(values.distances)
        if len(self._to_learn) < _LEARNS_TOGETHER:
            return
        rows = np.array(self._to_learn)
        self._centring.learn(rows, self._centring.residuals(rows, 0, None))
        self._to_learn.clear()
        self._scales = None

    def _learn_tensor(self, vectors: _Seen, tokens: Sequence[int] | None) -> None:
        self._mean = _blend(self._mean, self._mean_of(vectors), _MEANS_KEPT[self._direction])
        some = self._at_channels(vectors)
        if self._direction is Direction.ACTIVATION:
            scale = np.float32(1 / max(float(np.vdot(some, some)), features.TINY))
            self._moments = _blend(self._moments, (some * scale).T.dot(some), _MOMENTS_KEPT)
        if tokens is not None and self._usual is not None:
            if self._by_token is None:
                self._by_token = ByToken(some.shape[1])
            self._by_token.learn(self._pointing(vectors, vectors - self._usual.mean), tokens)
        self._usual = None

    def _mean_of(self, vectors: _Seen) -> _Seen:
        """(P, W) the mean over sequences."""
        return features.mean_of(vectors.reshape(self._seen.shape))

    def _look(self, tensor: Tensor) -> _Seen:
        """(n, W) what is at our places, sequence by sequence; until the next look."""
        if self._places is None:
            sequences, tokens, width = tensor.shape
            count = min(tokens - 1, max(_FEWEST_PLACES, _ELEMENTS // (sequences * width)))
            # Not the first place: labels do not tell what went in there.
            places = 1 + np.sort(self._generator.choice(tokens - 1, count, replace=False))
            token_of = places - 1 if self._direction is Direction.ACTIVATION else places
            self._label_places = (tokens * np.arange(sequences)[:, None] + token_of).ravel().tolist()
            self._places = torch.from_numpy(places).to(tensor.device)
            self._seen = torch.empty(sequences, count, width, pin_memory=tensor.is_cuda)
            self._vectors = self._seen.view(-1, width).numpy()
            if width > _MOST_CHANNELS:
                self._channels = np.sort(self._generator.choice(width, _MOST_CHANNELS, replace=False))
        self._seen.copy_(tensor.index_select(1, self._places))
        return self._vectors

    def _pointing(self, vectors: _Seen, away: _Seen) -> _Seen:
        """(n, channels) what is compared with tokens: of activations what they do not have in common anyway."""
        return self._at_channels(away if self._direction is Direction.ACTIVATION else vectors)

    def _at_channels(self, vectors: _Seen) -> _Seen:
        """Vectors (n, W) at our channels, which are all where there are few."""
        return vectors if self._channels is None else vectors[:, self._channels]

    def _measure(self, vectors: _Seen, tokens: Sequence[int] | None) -> _Measures | None:
        """None for what is not finite, and where it is the same at every place: then there is nothing of the text in
        it, however near to the mean it is."""
        if self._usual is None:
            self._usual = self._what_is_usual(vectors)
        usual, elements = self._usual, vectors.size
        away = vectors - usual.mean
        square = float(np.vdot(away, away))
        # The signs' product is 1 where they agree, and -1 where not.
        flips = max(0.0, 0.5 - float(np.vdot(np.copysign(_ONE, vectors), usual.signs)) / (2 * elements))
        own = usual.directions.dot(vectors.T)
        own.sort(axis=1)
        least, most = own.item(0), own.item(len(vectors) - 1)
        if not math.isfinite(square) or most - least <= _ROUNDING * abs(least):
            return None
        by_token = moments = 0.0
        if usual.moments is not None:
            moments = math.log(_agreement(self._at_channels(vectors), usual) + features.TINY)
        if tokens is not None and self._by_token is not None:
            by_token = self._by_token.agreement(self._pointing(vectors, away), tokens)
        distances = (
            _size(away) / elements,
            math.sqrt(square / elements) / usual.size,
            flips,
            _size(own - usual.projected) / own.size,
        )
        return _Measures(
            [math.log(one + few) for one, few in zip(distances, features.LEAST, strict=True)],
            (by_token, moments),
        )

    def _what_is_usual(self, vectors: _Seen) -> _Usual:
        """From what was learned; where that is nothing yet, from what is seen."""
        mean = self._mean_of(vectors) if self._mean is None else self._mean
        count, moments = len(self._seen), self._moments
        directions: _Seen = features.projections(vectors.shape[-1]).numpy().T
        projected = directions.dot(mean.T)
        projected.sort(axis=1)
        every = np.tile(mean, (count, 1))
        return _Usual(
            every,
            np.copysign(_ONE, every),
            math.sqrt(float(np.vdot(mean, mean)) / mean.size) + features.TINY,
            directions,
            projected.repeat(count, axis=1),
            moments,
            0.0 if moments is None else math.sqrt(float(np.vdot(moments, moments))) + features.TINY,
        )


class _Measures(NamedTuple):
    """The logarithms of `features.marginal_distances`; and how far the tensor agrees with its tokens (a cosine), and an
    activation with the stream's moments (a logarithm). 0 where nothing is known yet."""

    distances: list[float]
    agreement: tuple[float, float]


@dataclass(frozen=True)
class _Usual:
    """The mean (n, W) and its signs, -1 or 1, each as often as there are sequences, so that nothing is left to fit to
    what is seen; its root mean square; the directions (directions, W), and the mean's sorted projections on them, each
    as often, too; and of activations the second moments (channels, channels), and their norm."""

    mean: _Seen
    signs: _Seen
    size: float
    directions: _Seen
    projected: _Seen
    moments: _Seen | None
    moments_size: float


def _agreement(vectors: _Seen, usual: _Usual) -> float:
    """How much of vectors (n, channels) lies along what they usually have in common: the mean of `y M y`, weighted by
    their squared lengths. At most 1, as where all of them are along one direction."""
    assert usual.moments is not None
    squares = max(float(np.vdot(vectors, vectors)), features.TINY)
    return float(np.vdot(vectors.dot(usual.moments), vectors)) / squares / usual.moments_size


def _size(numbers: _Seen) -> float:
    """The sum of their absolute values, by operations that are at hand."""
    return float(np.vdot(numbers, np.copysign(_ONE, numbers)))


def _blend(old: _Seen | None, new: _Seen, kept: float) -> _Seen:
    """An EMA, which begins with the first. Both are overwritten: a new array is new memory."""
    if old is None:
        return new
    old *= np.float32(kept)
    new *= np.float32(1 - kept)
    old += new
    return old
