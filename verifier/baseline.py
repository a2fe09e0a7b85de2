"""What is usual in a stream: its mean tensor, and centre and spread of its features. Learns from accepted hops only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verifier.streams import Floats, Mask

_SCALE_FLOOR = 1e-6
_GAUSSIAN_MEAN_ABSOLUTE = 0.7978845608


class MeanTensor:
    """EMA of tensors, as the paper keeps it: `keep` is the weight of the old mean *per hop*, so that it does not matter
    how hops are batched. The paper's 0.9 per step of 8 replicas is 0.9 ** (1 / 8) per hop. `keep` 0 is its ablation
    "no EMA": the mean of the latest hops alone."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.value: Tensor | None = None

    def update(self, tensors: Tensor) -> None:
        """Learn from n >= 1 tensors, stacked along the first dimension."""
        mean = tensors.mean(0)
        if self.value is None or self.value.shape != mean.shape:
            self.value = mean.clone()
        else:
            self.value = torch.lerp(mean, self.value, self._keep ** len(tensors))


class Centring:
    """Residuals of F features: what is left after the stream's centre is taken away, in units of its spread.

    Replicas of a stage hold the same weights, so what moves all of them in one step is drift and not an attack. The
    centre is halfway between the slowly learned one and the median of this step's replicas, where there are enough of
    them. If their median is far off, the past is out of date, and the median stands alone (an honest majority).
    """

    enough = 3
    outdated = 4.0

    def __init__(self, features: int, *, follow_replicas: bool = True) -> None:
        self._centre = np.zeros(features)
        self._scale = np.ones(features)
        self._follow = follow_replicas
        self._seen = 0

    def residuals(self, values: Floats, trusted: Mask) -> Floats:
        """(N, F) standardised residuals of values (N, F); the step's median is taken over `trusted` (N,) rows."""
        if self._seen == 0:
            self._start(values)
        standard: Floats = (values - self._step_centre(values, trusted)) / self._scale
        return standard

    def learn(self, values: Floats, residuals: Floats) -> None:
        """Learn from accepted values (n, F) and the residuals that `residuals` gave for them."""
        n = len(values)
        if n == 0:
            return
        self._seen += n
        # A mean while young, then exponential forgetting over 32 hops for the centre and 96 for the spread.
        quick, slow = (max(n / (self._seen + n), 1 - (1 - 1 / hops) ** n) for hops in (32, 96))
        self._centre += quick * (np.median(values, axis=0) - self._centre)
        spread = np.minimum(np.abs(residuals), 5.0).mean(0) / _GAUSSIAN_MEAN_ABSOLUTE
        self._scale *= 1 + slow * (spread - 1)
        np.maximum(self._scale, _SCALE_FLOOR, out=self._scale)

    def _start(self, values: Floats) -> None:
        self._centre = np.median(values, axis=0)
        deviation = 1.4826 * np.median(np.abs(values - self._centre), axis=0)
        self._scale = np.maximum(deviation, 0.05 * np.maximum(np.abs(self._centre), 0.1))

    def _step_centre(self, values: Floats, trusted: Mask) -> Floats:
        if not self._follow or trusted.sum() < self.enough:
            return self._centre
        median = np.median(values[trusted], axis=0)
        shift = median - self._centre
        followed: Floats = self._centre + np.where(
            np.abs(shift) > self.outdated * self._scale, shift, shift / 2
        )
        return followed


class Spread:
    """How far apart the replicas of a step are, against what is usual: what moves most of them is not one's fault.

    With a minority of attackers the median replica is honest, or between honest ones. If even its score is higher than
    usual, the stage as a whole has become rougher, and all scores are divided by as much.
    """

    enough = 3

    def __init__(self, kinds: int) -> None:
        self._usual = np.ones(kinds)
        self._seen = 0

    def discount(self, scores: Floats, trusted: Mask) -> Floats:
        """(K,) what to divide scores (N, K) of one step by, at least 1."""
        if trusted.sum() < self.enough:
            return np.ones(scores.shape[1])
        excess: Floats = np.maximum(1.0, np.median(scores[trusted], axis=0) / self._usual)
        return excess

    def learn(self, scores: Floats) -> None:
        """Learn from the undiscounted scores (n, K) of accepted hops."""
        n = len(scores)
        self._seen += n
        quick = max(n / (self._seen + n), 1 - (1 - 1 / 64) ** n)
        self._usual += quick * (np.median(scores, axis=0) - self._usual)
        np.maximum(self._usual, 1e-3, out=self._usual)
