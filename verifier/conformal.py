"""Conformal p-values: how rare a score is among recent scores of peers in good standing."""

from __future__ import annotations

import numpy as np

from verifier.streams import Floats


class Reference:
    """The latest `size` accepted scores of K kinds.

    If a new honest score is exchangeable with these, its p-value is at most u with probability at most u, whatever the
    scores' distribution: no fence, no Gaussian.
    """

    def __init__(self, kinds: int, size: int) -> None:
        self._scores = np.zeros((size, kinds))
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, len(self._scores))

    def p_values(self, scores: Floats) -> Floats:
        """(N, K) shares of the reference that are at least as high, the new score itself counted in: never 0."""
        known = self._scores[: len(self)]
        above = (known[None] >= scores[:, None]).sum(1)
        p: Floats = (1 + above) / (1 + len(self))
        return p

    def admit(self, scores: Floats) -> None:
        """Add accepted scores (n, K), forgetting the oldest."""
        for start in range(0, len(scores), len(self._scores)):
            part = scores[start : start + len(self._scores)]
            places = (self._added + np.arange(len(part))) % len(self._scores)
            self._scores[places] = part
            self._added += len(part)
