"""The verdict ladder: ok, suspect (sampled more, routed less), quarantined, banned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocol.votes import Verdict


@dataclass(frozen=True)
class Standing:
    """A peer's verdict and what it rests on. `log_evidence` is in nats; `alpha` banned peers reach -log(alpha)."""

    verdict: Verdict = Verdict.OK
    log_evidence: float = 0.0
    samples: int = 0
    flags: int = 0
    audits: int = 0


@dataclass(frozen=True)
class Ladder:
    """Steps at equal distances in log evidence: a third, two thirds and the whole of the way to 1 / alpha.

    Evidence falls again while a peer behaves, so every step but the last is left by itself.
    """

    alpha: float

    @property
    def top(self) -> float:
        """Log evidence, in nats, at which a peer is banned."""
        return -math.log(self.alpha)

    def verdict(self, log_evidence: float) -> Verdict:
        if log_evidence >= self.top:
            return Verdict.BANNED
        if log_evidence >= self.top * 2 / 3:
            return Verdict.QUARANTINED
        if log_evidence >= self.top / 3:
            return Verdict.SUSPECT
        return Verdict.OK
