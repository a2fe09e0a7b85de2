"""Conformal p-values: how rare a score is among recent scores of peers in good standing."""

from __future__ import annotations

import numpy as np

from verifier.streams import Floats


class Window:
    """The latest `size` rows of K numbers. 8 bytes a number."""

    def __init__(self, kinds: int, size: int) -> None:
        self._rows = np.zeros((size, kinds))
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, len(self._rows))

    def values(self) -> Floats:
        """(len, K) what is remembered, in no particular order."""
        return self._rows[: len(self)]

    def admit(self, rows: Floats) -> None:
        """Add rows (n, K), forgetting the oldest."""
        latest = rows[-len(self._rows) :]
        places = (self._added + np.arange(len(latest))) % len(self._rows)
        self._rows[places] = latest
        self._added += len(latest)


def p_values(scores: Floats, reference: Window) -> Floats:
    """(N, K) shares of the reference that are at least as high as the scores (N, K), themselves counted in: never 0.

    If a new honest score is exchangeable with those of the reference, its p-value is at most u with probability at
    most u, whatever the scores' distribution: no fence, no Gaussian.
    """
    known = reference.values()
    # Counted one by one: sorting some hundreds to look up a few takes longer.
    at_least = np.array([np.count_nonzero(known >= score, axis=0) for score in scores])
    p: Floats = (1 + at_least.reshape(scores.shape)) / (1 + len(known))
    return p
