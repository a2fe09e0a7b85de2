"""What tensors have in common by token: nothing else says as well where an activation or a gradient points."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_Vectors = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.integer]

_TINY = np.float32(1e-20)


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

    def agreement(self, vectors: _Vectors, tokens: Tokens) -> float:
        """The mean cosine between vectors (n, channels) and what is usual of their tokens (n,), which counts for as
        much as it is long; 0 as long as nothing is known of any.

        A token's places together count as one: in a run of spaces, once the model has learned to expect them, all are
        off by the same.
        """
        rows = tokens % self.rows
        expected = self._means[rows]
        weights = 1 / np.bincount(rows)[rows]
        cosines = np.vecdot(vectors, expected) / _lengths(vectors)
        size = float(weights @ np.vecdot(expected, expected)) * float(weights.sum())
        return float(weights @ cosines) / math.sqrt(size) if size > 0 else 0.0

    def learn(self, vectors: _Vectors, tokens: Tokens) -> None:
        """As `agreement`. Every place counts the same, however large what is there; of a token that occurs more than
        once, one of its places."""
        rows = tokens % self.rows
        self._means[rows] += self._learned * (vectors / _lengths(vectors)[:, None] - self._means[rows])


def _lengths(vectors: _Vectors) -> _Vectors:
    lengths: _Vectors = np.sqrt(np.vecdot(vectors, vectors)) + _TINY
    return lengths
