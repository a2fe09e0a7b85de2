"""A detector of one's own: sentinel-node simulate --detector docs/examples/my_detector.py:NormWatch"""

import numpy as np

from verifier.detector import Court, Detector
from verifier.streams import Ban, Hops, Judgement


class NormWatch(Detector):
    """Refuses outputs much longer or shorter than their median in the stage, and bans after five refusals."""

    def __init__(self) -> None:
        self.refusals: dict[str, int] = {}

    def judge(self, hops: Hops, court: Court) -> Judgement:
        norms = hops.outputs.flatten(1).norm(dim=1).numpy()
        refused = ~hops.delivered | (np.abs(np.log(norms / np.median(norms) + 1e-9)) > 1)
        for row in np.flatnonzero(refused):
            self.refusals[hops.peers[row]] = self.refusals.get(hops.peers[row], 0) + 1
        worst = {peer for peer in hops.peers if self.refusals.get(peer, 0) >= 5}
        return Judgement(refused, tuple(Ban(peer, hops.stage, hops.round, "odd norms") for peer in worst))
