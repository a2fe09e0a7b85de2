"""What tensors have in common by token: nothing else says as well where an activation or a gradient points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Vectors = npt.NDArray[np.float32]

_TINY = 1e-20


class ByToken:
    """The mean direction of what is sent at a place, for each token that it belongs to.

    An activation's is the one that went in there, of which a residual stream keeps much; a gradient's is its label,
    whose logit would have to rise, and what the stages before the last make of that still shows it. So what was made of
    another text, or turned round, or of nothing at all, agrees with its tokens no more. Tokens share `rows` rows, since
    a vocabulary may be large.
    """

    rows = 1024
    _learned = 0.2

    def __init__(self, channels: int) -> None:
        self._means = np.zeros((self.rows, channels), np.float32)
        self._squares = [0.0] * self.rows

    def agreement(self, vectors: _Vectors, tokens: Sequence[int]) -> float:
        """The mean cosine between vectors (n, channels) and what is usual of their tokens (n,), which counts for as
        much as it is long; 0 as long as nothing is known of any.

        A token's places together count as one: in a run of spaces, once the model has learned to expect them, all are
        off by the same.
        """
        rows = [token % self.rows for token in tokens]
        along = np.vecdot(vectors, self._means.take(rows, 0)).tolist()
        squares = np.vecdot(vectors, vectors).tolist()
        times: dict[int, int] = {}
        for row in rows:
            times[row] = times.get(row, 0) + 1
        agreed = expected = 0.0
        for row, product, square in zip(rows, along, squares, strict=True):
            agreed += product / (math.sqrt(square) + _TINY) / times[row]
            expected += self._squares[row] / times[row]
        return agreed / math.sqrt(expected * len(times)) if expected > 0 else 0.0

    def learn(self, vectors: _Vectors, tokens: Sequence[int]) -> None:
        """As `agreement`. Every place counts the same, however large what is there; of a token that occurs more than
        once, the last of its places."""
        rows = [token % self.rows for token in tokens]
        lengths = np.sqrt(np.vecdot(vectors, vectors)) + np.float32(_TINY)
        known = self._means.take(rows, 0)
        known += np.float32(self._learned) * (vectors / lengths[:, None] - known)
        self._means[rows] = known
        for row, square in zip(rows, np.vecdot(known, known).tolist(), strict=True):
            self._squares[row] = square
