"""The cascade rule: what was odd before it came to a worker is not held against that worker.

An odd text, or a corruption that slipped through, makes every tensor behind it odd, in both directions. So each
microbatch carries an *oddness*, the score of what was last passed on, and the scores behind are divided by it. The
paper suspends the checks behind a flag; this is the same rule without the cliff: behind something twice as odd as
usual an attacker has to be twice as odd again to be seen, not infinitely.

Each family of features has its own oddness: what makes single tokens odd leaves the size of a tensor as it was. Only
from tokens to the first activation is it otherwise: a text that is odd to a head is odd to the next stage in all ways.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from verifier.streams import Direction, Floats, Hops, Mask

_Passage = tuple[int, int, Direction]


class Cascade:
    """Oddness of the microbatches under way, of at most `memory` passages, the oldest forgotten first."""

    # Scores are root mean squares of standardised residuals: up to here they are ordinary.
    ordinary = 1.5
    # The most that is granted on appearances. Beyond it, a microbatch must have been proven odd by a second replica, or
    # attackers in a row could each be a little worse than the last.
    unproven = 3.0
    # A stage's score depends on the microbatch and on the stage; what was odd far behind counts less.
    fading = 0.9

    def __init__(self, memory: int = 4096) -> None:
        self._oddness: OrderedDict[_Passage, Floats] = OrderedDict()
        self._memory = memory

    def discount(self, hops: Hops, kinds: int) -> Floats:
        """(N, K) what to divide each hop's scores by, at least 1. Gradients start from the way forward."""
        before = np.zeros((len(hops), kinds))
        for row, microbatch in enumerate(hops.microbatches):
            before[row] = self._before(hops, microbatch)
        return np.maximum(1.0, before / self.ordinary)

    def note(self, hops: Hops, scores: Floats, passed: Mask, proven: Mask) -> None:
        """Remember the scores (N, K) of each hop that was passed on; in full only where its sender is proven honest."""
        granted = np.where(proven[:, None], scores, np.minimum(scores, self.unproven))
        if hops.direction is Direction.ACTIVATION and hops.from_tokens:
            granted = np.broadcast_to(granted.max(1, keepdims=True), granted.shape)
        for row in np.flatnonzero(passed):
            microbatch = hops.microbatches[row]
            oddness = np.maximum(granted[row], self.fading * self._before(hops, microbatch))
            self._oddness[hops.round, microbatch, hops.direction] = oddness
            if len(self._oddness) > self._memory:
                self._oddness.popitem(last=False)

    def _before(self, hops: Hops, microbatch: int) -> Floats | float:
        forward = self._oddness.get((hops.round, microbatch, Direction.ACTIVATION), 0.0)
        if hops.direction is Direction.ACTIVATION:
            return forward
        return self._oddness.get((hops.round, microbatch, Direction.GRADIENT), forward)
