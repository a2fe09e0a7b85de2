"""The inline guard: what a receiver asks of every tensor before it uses it. It sees single tensors, not their inputs.

The paper's check on the statistics of `verifier.features`, on the tokens at a few places that the receiver draws by
itself and tells nobody: a corruption of the whole tensor shows there as well as anywhere, and looking at every element
of every tensor would cost more than the check is worth. In NumPy, and plain floats where there are four of them: when
a stage has worked, nothing of this is in a cache any more, so it is the number of operations that costs.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verifier import features
from verifier.baseline import Centring, MeanTensor
from verifier.streams import Direction, Mask, Peer

_Seen: TypeAlias = npt.NDArray[np.float32]

_ELEMENTS = 2048
_FEWEST_PLACES = 4
_ROUNDING = 1e-5
"""Of a projection: what may tell equal tokens apart."""
_LATEST = 24
# While it is young it learns from every tensor, then from every fourth: learning costs as much as looking.
_YOUNG, _LEARNS_EVERY = 64, 4
# What honest gradients do: in training their sizes change severalfold within a few microbatches, all at once. In logs,
# so that three sizes have to be off by a factor of eight between them. Signs have no size.
_FLOORS = {Direction.ACTIVATION: None, Direction.GRADIENT: np.array([0.3, 0.3, 0.0, 0.3])}


class _Latest:
    """The latest tensors, by sender, and which of them were odd."""

    def __init__(self) -> None:
        self._latest: deque[tuple[Peer, bool]] = deque(maxlen=_LATEST)

    def note(self, sender: Peer, is_odd: bool) -> bool:
        """Whether most senders are odd by now: then it is not they who have changed."""
        self._latest.append((sender, is_odd))
        if not is_odd or len(self._latest) < _LATEST:
            return False
        sent, odd = Counter(one for one, _ in self._latest), Counter(one for one, was in self._latest if was)
        if 2 * sum(2 * odd[peer] > sent[peer] for peer in sent) <= len(sent):
            return False
        self._latest.clear()
        return True


class Guard:
    """Of one receiver and one direction. `check` every tensor that arrives; what passes, it learns from.

    `limit` is in robust standard deviations (`Settings.guard`). What is flagged is not learned from; but if more than
    half of the peers that sent the latest tensors are flagged, then it is the stream that has changed, and the
    baseline starts anew: a receiver that refuses everybody would end the run.
    """

    def __init__(self, direction: Direction, generator: np.random.Generator, limit: float = 6.0) -> None:
        self._generator, self._limit = generator, limit
        self._mean = MeanTensor({Direction.ACTIVATION: 0.9, Direction.GRADIENT: 0.8}[direction] ** (1 / 8))
        self._centring = Centring(len(features.MARGINAL), _FLOORS[direction])
        self._latest = _Latest()
        self._places: torch.Tensor | None = None
        self._usual: _Usual | None = None
        self._scales: tuple[list[float], list[float]] | None = None
        self.checked = self.flagged = 0

    def check(self, tensor: Tensor, sender: Peer) -> bool:
        """Whether a tensor (B, T, W) of any floating dtype, on any device, may be used."""
        seen = self._look(tensor)
        distances, is_uniform = self._measure(seen)
        is_odd = is_uniform or self._is_odd(distances)
        if not is_odd and (self.checked < _YOUNG or self.checked % _LEARNS_EVERY == 0):
            self._learn(seen, distances)
        self.checked += 1
        self.flagged += is_odd
        if self._latest.note(sender, is_odd):
            self._centring.restart()
            self._scales = None
        return not is_odd

    def _is_odd(self, distances: Sequence[float]) -> bool:
        if not all(map(math.isfinite, distances)):
            return True
        if self._scales is None:
            self._scales = self._centring.scales()
        if self._scales is None:
            return False
        squares = 0.0
        for distance, least, centre, scale in zip(distances, features.LEAST, *self._scales, strict=True):
            squares += ((math.log(distance + least) - centre) / scale) ** 2
        return math.sqrt(squares / len(distances)) > self._limit

    def _learn(self, seen: _Seen, distances: Sequence[float]) -> None:
        values = features.log_marginal(np.array([distances]))
        self._centring.learn(values, self._centring.residuals(values, 0, None))
        self._mean.update(torch.from_numpy(seen.mean(0)), 1)
        self._usual = self._scales = None

    def _look(self, tensor: Tensor) -> _Seen:
        """(B, P, W) the tokens at our places."""
        sequences, tokens, width = tensor.shape
        if self._places is None:
            count = min(tokens, max(_FEWEST_PLACES, _ELEMENTS // (sequences * width)))
            drawn = self._generator.choice(tokens, count, replace=False)
            self._places = torch.from_numpy(np.sort(drawn)).to(tensor.device)
        seen: _Seen = tensor.detach().index_select(1, self._places).to("cpu", torch.float32).numpy()
        return seen

    def _measure(self, seen: _Seen) -> tuple[tuple[float, float, float, float], bool]:
        """As `features.marginal_distances`; and whether every token is the same: then there is nothing of the text in
        them, however near to the mean they are."""
        if self._usual is None:
            mean = seen.mean(0) if self._mean.value is None else self._mean.value.numpy()
            self._usual = _Usual.of(mean, len(seen))
        usual, elements = self._usual, seen.size
        away = (seen - usual.mean).ravel()
        length = math.sqrt(float(np.vdot(away, away)) / elements) / usual.size
        flips = np.count_nonzero(np.signbit(seen) != usual.negative) / elements
        own = _project(seen.reshape(-1, seen.shape[-1]))
        is_uniform = bool(own[0, -1] - own[0, 0] <= _ROUNDING * abs(own[0, 0]))
        apart = (own - usual.projected).ravel()
        return (_size(away) / elements, length, flips, _size(apart) / own.size), is_uniform


@dataclass(frozen=True)
class _Usual:
    """The mean (P, W), which of it is negative, its root mean square, and its sorted projections, each as often as
    there are sequences."""

    mean: _Seen
    negative: Mask
    size: float
    projected: _Seen

    @classmethod
    def of(cls, mean: _Seen, sequences: int) -> _Usual:
        size = math.sqrt(float(np.vdot(mean, mean)) / mean.size) + 1e-20
        return cls(mean, np.signbit(mean), size, _project(mean).repeat(sequences, axis=1))


def _project(tokens: _Seen) -> _Seen:
    """(directions, tokens) sorted projections of tokens (tokens, W)."""
    projected: _Seen = features.projections(tokens.shape[-1]).numpy().T @ tokens.T
    projected.sort(axis=1)
    return projected


def _size(numbers: _Seen) -> float:
    """The sum of absolute values of numbers (n,), which are overwritten."""
    return float(np.vdot(np.abs(numbers, out=numbers), features.ones(len(numbers))))


class Repeats:
    """Of one receiver: whether a sender's tensor came from it before, made of something else.

    No two inputs give an honest stage the same output to the last bit; who sends what it sent before, whatever it was
    given, does. By digests, which are there anyway: it costs a look-up. Of one sender, or others could make its own
    look repeated.
    """

    _remembered = 4096

    def __init__(self) -> None:
        self._inputs: OrderedDict[tuple[Peer, bytes], bytes] = OrderedDict()

    def check(self, sender: Peer, tensor: bytes, made_of: bytes) -> bool:
        """Whether a tensor of this digest may be used, which its sender says it made of an input of that digest."""
        known = self._inputs.setdefault((sender, tensor), made_of)
        if len(self._inputs) > self._remembered:
            self._inputs.popitem(last=False)
        return known == made_of


class LossGuard:
    """Of a last stage: whether the loss that an activation led to may be learned from.

    Whatever is done to an activation, harm to the model is loss: this sees what keeps the marginals as they are, such
    as flipped signs or another microbatch's activation. One microbatch's loss says little, since texts differ; so for
    each sender the standardised losses are summed up, less an allowance (Page's CUSUM, 1954), and what it sends is
    flagged while the sum is above `limit`, in robust standard deviations. The loss falls as training goes on, in its
    beginning by more than texts differ: so what is standardised is how far a loss is from the few before it, among how
    far the latest were. That names nobody, as the corruption may be older than the sender: verifiers look at what is
    flagged. If most senders are odd all starts anew, as for `Guard`.
    """

    _allowance = 1.5
    """More than for normal losses: hard texts are further from the median than easy ones."""
    _near = 6
    _enough = 8
    _remembered = 24
    _finest = 0.02
    _most_senders = 256

    def __init__(self, limit: float = 6.0) -> None:
        self._limit = limit
        self._usual: deque[float] = deque(maxlen=self._near)
        self._away: deque[float] = deque(maxlen=self._remembered)
        """How far the latest usual losses were from the median of those before them."""
        self._sums: OrderedDict[Peer, float] = OrderedDict()
        self._latest = _Latest()

    def check(self, loss: float, sender: Peer, *, is_retry: bool = False) -> bool:
        """Whether a microbatch's mean loss, in nats a token and finite, may be learned from.

        `is_retry`: of a microbatch that was lost before. A hard text that comes again says nothing new of its sender.
        """
        if is_retry:
            return self._sums.get(sender, 0.0) <= self._limit
        if len(self._usual) < self._near:
            self._usual.append(loss)
            return True
        expected = median(self._usual)
        beyond = self._standardised(loss - expected, expected) - self._allowance
        # Bounded, so that a sender that mends is believed again soon.
        total = min(max(0.0, self._sums.pop(sender, 0.0) + beyond), 2 * self._limit)
        self._sums[sender] = total
        if len(self._sums) > self._most_senders:
            self._sums.popitem(last=False)
        is_odd = total > self._limit
        if not is_odd:
            self._usual.append(loss)
            self._away.append(loss - expected)
        if self._latest.note(sender, is_odd):
            self._usual.clear()
            self._away.clear()
            self._sums.clear()
        return not is_odd

    def _standardised(self, away: float, expected: float) -> float:
        if len(self._away) < self._enough:
            return 0.0
        centre = median(self._away)
        spread = 1.4826 * median(abs(one - centre) for one in self._away)
        # A fall may end at any time: that alone is no more than the allowance.
        return (away - centre) / max(spread, abs(centre), self._finest * expected)
