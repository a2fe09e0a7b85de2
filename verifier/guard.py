"""The inline guard: what a receiver asks of every tensor before it uses it. It sees single tensors, not their inputs.

The paper's check on the statistics of `verifier.features`; and how well the tensor agrees with the stream in its mean
and in what its channels have in common, which tells noise of the right size, and whose signs were changed; and how well
a gradient agrees with its labels, which tells that it is another's, or was turned round. All of it on
the tokens at a few places that the receiver draws by itself and tells nobody: a corruption of the whole tensor shows
there as well as anywhere, and looking at every element of every tensor would cost more than the check is worth. In
NumPy, and plain floats where there are few of them: when a stage has worked, nothing of this is in a cache any more, so
it is the number of operations that costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verifier import features
from verifier.baseline import Centring, MeanTensor, Recent
from verifier.labels import ByLabel, Labels
from verifier.senders import Apart, Latest, Sums
from verifier.streams import Direction, Peer

_Seen: TypeAlias = npt.NDArray[np.float32]

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
_NEWBORN, _LEARNS_TENSORS_EVERY = 16, 8
# Each time that they are learned: of means the paper's, per step of eight replicas.
_MEANS_KEPT = {Direction.ACTIVATION: 0.9 ** (1 / 4), Direction.GRADIENT: 0.8 ** (1 / 4)}
_MOMENTS_KEPT = 0.9
_FINEST = (0.1, 0.1, 0.05)
"""Of what a tensor agrees by, as in `_Measures`: less than that is no difference."""
_DISAGREEMENT_ALLOWED = 3.0
"""Standard deviations each time: what honest texts disagree by has a heavy tail."""
# What honest gradients do: in training their sizes change severalfold within a few microbatches, all at once. In logs,
# so that three sizes have to be off by a factor of eight between them. Signs have no size.
_FLOORS = {Direction.ACTIVATION: None, Direction.GRADIENT: np.array([0.3, 0.3, 0.0, 0.3])}


class Guard:
    """Of one receiver and one direction. `check` every tensor that arrives; what passes, it learns from.

    `limit` is in robust standard deviations (`Settings.guard`). What is flagged is not learned from; but if more than
    half of the peers that sent the latest tensors are flagged, then it is the stream that has changed, and the
    baseline starts anew: a receiver that refuses everybody would end the run.
    """

    def __init__(self, direction: Direction, generator: np.random.Generator, limit: float = 6.0) -> None:
        self._generator, self._limit = generator, limit
        self._mean = MeanTensor(_MEANS_KEPT[direction])
        self._moments = MeanTensor(_MOMENTS_KEPT)
        self._centring = Centring(len(features.MARGINAL), _FLOORS[direction])
        self._by_label: ByLabel | None = None
        self._agreement = (Recent(), Recent(), Recent())
        self._disagreement = Sums(_DISAGREEMENT_ALLOWED, limit)
        self._apart = Apart()
        self._latest = Latest()
        self._places: torch.Tensor | None = None
        self._numbers: npt.NDArray[np.int64] | None = None
        self._channels: npt.NDArray[np.int64] | None = None
        self._usual: _Usual | None = None
        self._scales: tuple[list[float], list[float]] | None = None
        self.checked = self.flagged = 0

    def check(self, tensor: Tensor, sender: Peer, labels: Labels | None = None) -> bool:
        """Whether a tensor (B, T, W) of any floating dtype, on any device, may be used. `labels` (B, T): a
        gradient's."""
        seen = self._look(tensor)
        own = None if labels is None else labels[:, self._numbers].ravel()
        values = self._measure(seen, own)
        is_odd = values is None or self._is_odd(values, sender)
        if values is not None and not is_odd:
            if self.checked < _YOUNG or self.checked % _LEARNS_EVERY == 0:
                self._learn(values)
            if self.checked < _NEWBORN or self.checked % _LEARNS_TENSORS_EVERY == 0:
                self._learn_tensor(seen, own)
        self.checked += 1
        self.flagged += is_odd
        if self._latest.note(sender, is_odd):
            self._centring.restart()
            self._disagreement.clear()
            for one in self._agreement:
                one.clear()
            self._scales = None
        return not is_odd

    def hears_only(self, sender: Peer) -> bool:
        """Whether nobody else has sent anything of late."""
        return self._latest.are_all_of(sender)

    def _is_odd(self, values: _Measures, sender: Peer) -> bool:
        deviations = (
            usual.deviation(value, finest)
            for usual, value, finest in zip(self._agreement, values.agreement, _FINEST, strict=True)
        )
        if self._disagreement.add(sender, self._apart.beyond(sender, -min(deviations))):
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
        row = np.array([values.distances])
        self._centring.learn(row, self._centring.residuals(row, 0, None))
        for usual, value in zip(self._agreement, values.agreement, strict=True):
            usual.learn(value)
        self._scales = None

    def _learn_tensor(self, seen: _Seen, labels: Labels | None) -> None:
        self._mean.update(torch.from_numpy(seen.mean(0)), 1)
        tokens = self._at_channels(seen.reshape(-1, seen.shape[-1]))
        size = max(float(np.vdot(tokens, tokens)), features.TINY)
        self._moments.update(torch.from_numpy(tokens.T @ tokens / size), 1)
        if labels is not None:
            if self._by_label is None:
                self._by_label = ByLabel(tokens.shape[1])
            self._by_label.learn(tokens, labels)
        self._usual = None

    def _look(self, tensor: Tensor) -> _Seen:
        """(B, P, W) the tokens at our places."""
        sequences, tokens, width = tensor.shape
        if self._places is None:
            count = min(tokens, max(_FEWEST_PLACES, _ELEMENTS // (sequences * width)))
            self._numbers = np.sort(self._generator.choice(tokens, count, replace=False))
            self._places = torch.from_numpy(self._numbers).to(tensor.device)
            if width > _MOST_CHANNELS:
                self._channels = np.sort(self._generator.choice(width, _MOST_CHANNELS, replace=False))
        seen: _Seen = tensor.detach().index_select(1, self._places).to("cpu", torch.float32).numpy()
        return seen

    def _at_channels(self, tokens: _Seen) -> _Seen:
        """Tokens (n, W) at our channels, which are all where there are few."""
        return tokens if self._channels is None else tokens[:, self._channels]

    def _measure(self, seen: _Seen, labels: Labels | None) -> _Measures | None:
        """None for what is not finite, and where every token is the same: then there is nothing of the text in them,
        however near to the mean they are."""
        if self._usual is None:
            self._usual = self._what_is_usual(seen)
        usual, elements = self._usual, seen.size
        flat, tokens = seen.ravel(), seen.reshape(-1, seen.shape[-1])
        away = flat - usual.mean
        square, squares = float(np.vdot(away, away)), float(np.vdot(flat, flat))
        # The signs' product is 1 where they agree, and -1 where not.
        flips = max(0.0, 0.5 - float(np.vdot(np.copysign(_ONE, flat), usual.signs)) / (2 * elements))
        own = usual.directions @ tokens.T
        own.sort(axis=1)
        least, most = own.item(0), own.item(len(tokens) - 1)
        if not math.isfinite(square + squares) or most - least <= _ROUNDING * abs(least):
            return None
        apart = (own - usual.projected).ravel()
        # Of the angle to the mean, by the law of cosines; rounding may make more of it than there can be.
        length = usual.size * math.sqrt(elements)
        mean = (squares + length**2 - square) / (2 * length * math.sqrt(squares))
        chosen = self._at_channels(tokens)
        moments = usual.agreement(chosen)
        answer = 0.0
        if labels is not None and self._by_label is not None:
            answer = self._by_label.agreement(chosen, labels)
        distances = (
            _size(away) / elements, math.sqrt(square / elements) / usual.size, flips, _size(apart) / own.size
        )  # fmt: skip
        return _Measures(
            [math.log(one + few) for one, few in zip(distances, features.LEAST, strict=True)],
            (max(-1.0, min(1.0, mean)), math.log(moments + features.TINY), answer),
        )

    def _what_is_usual(self, seen: _Seen) -> _Usual:
        """From what was learned; where that is nothing yet, from what is seen."""
        mean = seen.mean(0) if self._mean.value is None else self._mean.value.numpy()
        if self._moments.value is None:
            moments = np.eye(min(seen.shape[-1], _MOST_CHANNELS), dtype=np.float32)
        else:
            moments = self._moments.value.numpy()
        directions: _Seen = features.projections(seen.shape[-1]).numpy().T
        projected = np.sort(directions @ mean.T, axis=1)
        every = np.tile(mean.ravel(), len(seen))
        return _Usual(
            every,
            np.copysign(_ONE, every),
            math.sqrt(float(np.vdot(mean, mean)) / mean.size) + features.TINY,
            directions,
            projected.repeat(len(seen), axis=1),
            moments / (math.sqrt(float(np.vdot(moments, moments))) + features.TINY),
        )


class _Measures(NamedTuple):
    """The logarithms of `features.marginal_distances`; and how far the tensor agrees with the stream in its mean (a
    cosine) and in its moments (a logarithm), and a gradient with its labels (a cosine, 0 of anything else)."""

    distances: list[float]
    agreement: tuple[float, float, float]


@dataclass(frozen=True)
class _Usual:
    """The mean (P W) and its signs, -1 or 1, each as often as there are sequences, so that nothing is left to fit to
    what is seen; its root mean square; the directions (directions, W), and the mean's sorted projections on them, each
    as often, too; and the tokens' second moments (channels, channels), of norm 1."""

    mean: _Seen
    signs: _Seen
    size: float
    directions: _Seen
    projected: _Seen
    moments: _Seen

    def agreement(self, tokens: _Seen) -> float:
        """How much of tokens (n, channels) lies along what they usually have in common: the mean of `y M y`, weighted
        by the tokens' squared lengths. At most 1, as where all of them are along one direction."""
        squares = max(float(np.vdot(tokens, tokens)), features.TINY)
        return float(np.vdot(tokens @ self.moments, tokens)) / squares


def _size(numbers: _Seen) -> float:
    """The sum of absolute values of numbers (n,), which are overwritten."""
    return float(np.vdot(np.abs(numbers, out=numbers), features.ones(len(numbers))))
