"""What gradients have in common by label: the next token says better than anything else where a gradient points."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer]

_TINY = np.float32(1e-20)


class ByLabel:
    """The mean direction of the gradient at a token, for each label: a last stage's gradient is what the label's
    logit would have to rise by, and what the stages before make of it still shows that.

    So gradients of another text, turned round, or of nothing at all agree with their labels no more. Labels share
    `rows` rows, since a vocabulary may be large.
    """

    rows = 1024
    _learned = 0.2

    def __init__(self, channels: int) -> None:
        self._means = np.zeros((self.rows, channels), np.float32)

    def agreement(self, tokens: _Vectors, labels: Labels) -> float:
        """The mean cosine between tokens (n, channels) and what is usual of their labels (n,), which counts for as much
        as it is long; 0 as long as nothing is known of any."""
        expected = self._means[labels % self.rows]
        cosines = np.vecdot(tokens, expected) / _lengths(tokens)
        size = float(np.vdot(expected, expected)) * len(tokens)
        return float(cosines.sum()) / math.sqrt(size) if size > 0 else 0.0

    def learn(self, tokens: _Vectors, labels: Labels) -> None:
        """As `agreement`. Every token counts the same, however large its gradient; of a label that occurs more than
        once, one of its tokens."""
        rows = labels % self.rows
        self._means[rows] += self._learned * (tokens / _lengths(tokens)[:, None] - self._means[rows])


def _lengths(tokens: _Vectors) -> _Vectors:
    lengths: _Vectors = np.sqrt(np.vecdot(tokens, tokens)) + _TINY
    return lengths
