"""Evidence by counting, as the paper has it: so many violations are a ban."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verifier.streams import Mask


class ViolationCounter:
    """One counter per peer: up by one on a violation, down by `decay` on a clean tensor, never below 0.

    The paper's count is not known; `limit` 5 fits its detection speed of 6 to 7 iterations.
    """

    limit = 5.0
    decay = 0.1

    def __init__(self, peers: int) -> None:
        self._counts = np.zeros(peers)

    def forget(self, row: int) -> None:
        self._counts[row] = 0

    def count(self, rows: npt.NDArray[np.intp], violated: Mask) -> None:
        """Note one observation for each of n *different* rows."""
        changed = np.where(violated, self._counts[rows] + 1, self._counts[rows] - self.decay)
        self._counts[rows] = np.maximum(changed, 0)

    def share(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """(n,) how far each row is on its way to a ban: 1 is there."""
        share: npt.NDArray[np.float64] = self._counts[rows] / self.limit
        return share
