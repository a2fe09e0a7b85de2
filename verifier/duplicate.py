"""`duplicate`: every hop is recomputed (Lu et al., ICML 2024): certain, and at least twice the work."""

from __future__ import annotations

import numpy as np

from verifier.detector import Court, Detector
from verifier.streams import Ban, Hops, Judgement


class Duplicate(Detector):
    """Refuses and bans what other replicas cannot reproduce."""

    def judge(self, hops: Hops, court: Court) -> Judgement:
        guilty = np.array([court.hear(hops, row).guilty is True for row in range(len(hops))], dtype=np.bool_)
        found = sorted({hops.peers[row] for row in np.flatnonzero(guilty)})
        reason = f"recomputation of a {hops.direction} differs"
        return Judgement(guilty, tuple(Ban(peer, hops.stage, hops.round, reason) for peer in found))
