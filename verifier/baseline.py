"""What is usual in a stream: its mean tensor, and centre and spread of its features. Learns from accepted hops only."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np
import torch
from torch import Tensor

from verifier.streams import Floats, Mask

_SCALE_FLOOR = 1e-6
# Of the absolute value of a standard normal variable.
_GAUSSIAN_MEDIAN = 0.6744897502


def middle(values: Floats) -> Floats:
    """(F,) the median of each column of values (n, F), n >= 1. NumPy's own takes ten times as long on a few rows."""
    ordered = np.sort(values, axis=0)
    median: Floats = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
    return median


class MeanTensor:
    """EMA of tensors, as the paper keeps it: `keep` is the weight of the old mean *per hop*, so that it does not matter
    how hops are batched. The paper's 0.9 per step of 8 replicas is 0.9 ** (1 / 8) per hop. `keep` 0 is its ablation
    "no EMA": the mean of the latest hops alone."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.value: Tensor | None = None

    def update(self, mean: Tensor, hops: int) -> None:
        """Learn from the mean of as many hops."""
        if self.value is None or self.value.shape != mean.shape:
            self.value = mean.clone()
        else:
            self.value = torch.lerp(mean, self.value, self._keep**hops)


class MeanByToken:
    """The mean output of each token, where what went in is tokens: what is usual for a token stands for the input.

    A head's activations mostly follow from its tokens, a tail's gradients from its labels. Tokens share `rows` rows.
    """

    rows = 1024
    infancy = 80
    """Hops until most that will come has been seen."""
    _memory = 256

    def __init__(self) -> None:
        self._means: Tensor | None = None
        self._seen = torch.zeros(self.rows)
        self._hops = 0

    @property
    def ready(self) -> bool:
        return self._hops >= self.infancy

    def expect(self, tokens: Tensor, unknown: Tensor) -> Tensor:
        """(N, B, T, W) for tokens (N, B, T); `unknown` (W,) for those never seen."""
        if self._means is None or self._means.shape[1] != unknown.shape[0]:
            return unknown.expand(*tokens.shape, -1)
        rows = tokens % self.rows
        return torch.where((self._seen[rows] > 0)[..., None], self._means[rows], unknown)

    def update(self, tokens: Tensor, outputs: Tensor) -> None:
        """Learn from outputs (N, B, T, W): a mean while young, then of the latest few hundred of each token."""
        self._hops += len(tokens)
        rows, width = (tokens % self.rows).flatten(), outputs.shape[-1]
        if self._means is None or self._means.shape[1] != width:
            self._means, self._seen = torch.zeros(self.rows, width), torch.zeros(self.rows)
        count = torch.bincount(rows, minlength=self.rows).float()
        total = torch.zeros(self.rows, width).index_add_(0, rows, outputs.reshape(-1, width).float())
        self._seen = (self._seen + count).clamp_max(self._memory)
        share = (count / self._seen.clamp_min(1)).clamp_max(1)[:, None]
        self._means = torch.lerp(self._means, total / count.clamp_min(1)[:, None], share)


class Centring:
    """Residuals of F features: what is left after the stream's centre is taken away, in units of its spread.

    Replicas of a stage hold the same weights, so what moves all of them in one step is drift and not an attack. Where
    a whole *group* of replicas is seen at once (so many that the honest are its majority), the step's centre is halfway
    between the slowly learned one and their median; if their median is far off, the past is out of date, and the median
    stands alone. Hops of the same round that come later, alone, use the step's centre too.

    A group makes it `ready` at once. Without one it is ready after `infancy` hops, of which a minority may be corrupt.
    """

    outdated = 4.0
    adapting = 0.03
    infancy = 32

    def __init__(self, features: int, floor: Floats | None = None) -> None:
        """`floor` (F,): scales are never taken to be smaller."""
        self._floor = np.maximum(np.zeros(features) if floor is None else floor, _SCALE_FLOOR)
        self._centre = np.zeros(features)
        self._scale = np.ones(features)
        self._step: tuple[int, Floats] | None = None
        self._young: list[Floats] = []
        self._seen = 0
        self.ready = False

    def residuals(self, values: Floats, round: int, group: Mask | None) -> Floats:
        """(N, F) standardised residuals of values (N, F); 0 before it is ready.

        `group` (N,): the rows to take the step's median over.
        """
        if not self.ready and group is not None:
            self._start(values[group])
        if not self.ready:
            return np.zeros_like(values)
        if group is not None:
            self._step = round, self._follow(middle(values[group]))
        centre = self._step[1] if self._step is not None and self._step[0] == round else self._centre
        standard: Floats = (values - centre) / self._scale
        return standard

    def learn(self, values: Floats, residuals: Floats) -> None:
        """Learn from accepted values (n, F) and the residuals that `residuals` gave for them."""
        if not self.ready:
            self._young += list(values)
            if len(self._young) >= self.infancy:
                self._start(np.array(self._young))
            return
        n = len(values)
        self._seen += n
        # A mean while young, then exponential forgetting over 32 hops.
        quick = max(n / (self._seen + n), 1 - (1 - 1 / 32) ** n)
        off = (middle(values) - self._centre) / self._scale
        self._centre = self._centre + quick * self._scale * np.clip(off, -3.0, 3.0)
        # Tracks the median residual: up by a little for each that is larger, down for each that is smaller. Of two
        # fifths that are corrupt, however grossly, it can become twice too large and no more.
        beyond = (np.abs(residuals) > _GAUSSIAN_MEDIAN).sum(0) - n / 2
        little = max(self.adapting, min(0.15, 4 / self._seen))
        self._scale = np.maximum(self._scale * np.exp(little * beyond), self._floor)

    def scales(self) -> tuple[list[float], list[float]] | None:
        """Centre and scale of each feature, if ready: what `residuals` uses where there is no group."""
        return (self._centre.tolist(), self._scale.tolist()) if self.ready else None

    def knows(self, round: int) -> bool:
        """Whether a group of this round has been seen, so that its other hops are compared with that."""
        return self._step is not None and self._step[0] == round

    @property
    def settled(self) -> bool:
        """Whether residuals are on their final scale, so that scores made of them can be compared with later ones."""
        return self._seen >= 64

    def restart(self) -> None:
        """Forget everything: the stream is no longer what it was."""
        self.ready, self._young, self._step, self._seen = False, [], None, 0

    def _start(self, values: Floats) -> None:
        self.ready, self._young = True, []
        self._centre = middle(values)
        deviation = 1.4826 * middle(np.abs(values - self._centre))
        least = np.maximum(self._floor, 2e-3 * np.maximum(np.abs(self._centre), 0.1))
        self._scale = np.maximum(1.5 * deviation, least)

    def _follow(self, median: Floats) -> Floats:
        shift = median - self._centre
        followed: Floats = self._centre + np.where(
            np.abs(shift) > self.outdated * self._scale, shift, shift / 2
        )
        return followed


class Spread:
    """How far apart the replicas of a step are, against what is usual: what moves most of them is not one's fault.

    The median replica of a group is honest, or between honest ones. If even its score is higher than usual, the stage
    as a whole has become rougher, and all scores of the step are divided by as much.
    """

    def __init__(self, kinds: int) -> None:
        self._usual = np.ones(kinds)
        self._step: tuple[int, Floats] | None = None
        self._seen = 0

    def discount(self, scores: Floats, round: int, group: Mask | None) -> Floats:
        """(K,) what to divide scores (N, K) by, at least 1; rows and rounds as in `Centring.residuals`."""
        if group is not None:
            self._step = round, np.maximum(middle(scores[group]), _SCALE_FLOOR)
        discount: Floats = np.maximum(1.0, self.typical(round) / self._usual)
        return discount

    def typical(self, round: int) -> Floats:
        """(K,) the median score of the round's group, or the usual one where there was none."""
        return self._step[1] if self._step is not None and self._step[0] == round else self._usual

    def learn(self, scores: Floats) -> None:
        """Learn from the undiscounted scores (n, K) of accepted hops."""
        n = len(scores)
        self._seen += n
        quick = max(n / (self._seen + n), 1 - (1 - 1 / 64) ** n)
        self._usual = np.maximum(self._usual + quick * (middle(scores) - self._usual), 1e-3)


class Recent:
    """What is usual of one number that drifts, from few of them: how far it is from the `near` before it, among how far
    the latest were from those before them. With `finest`, a spread is never taken to be smaller.

    For one that falls or rises by more than it varies, as losses and their like do in a run's beginning: to compare it
    with the mean of the latest would hide an outlier altogether.
    """

    near = 6
    enough = 8
    remembered = 24

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=self.near)
        self._away: deque[float] = deque(maxlen=self.remembered)
        self._expected = self._drift = self._spread = 0.0

    def deviation(self, value: float, finest: float) -> float:
        """In robust standard deviations; 0 as long as there is not enough to compare with."""
        if len(self._away) < self.enough:
            return 0.0
        # A drift may end at any time: that alone is no more than one deviation.
        return (value - self._expected - self._drift) / max(self._spread, abs(self._drift), finest)

    @property
    def expected(self) -> float:
        return self._expected

    def learn(self, value: float) -> None:
        """Of accepted values only."""
        if len(self._usual) == self.near:
            self._away.append(value - self._expected)
            self._drift = median(self._away)
            self._spread = 1.4826 * median(abs(one - self._drift) for one in self._away)
        self._usual.append(value)
        self._expected = median(self._usual)

    def clear(self) -> None:
        """Forget everything: it is no longer what it was."""
        self._usual.clear()
        self._away.clear()
