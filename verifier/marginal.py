"""`marginal`: the paper's detector, as faithfully as it can be had, for a fair comparison.

Per stream an EMA of the mean tensor (beta 0.9 for activations, 0.8 for gradients); four distances to it; a Tukey fence
Q3 + k IQR over recent unflagged distances, adapted online; any distance beyond its fence flags the tensor; flags count
towards a ban; a flag suspends the checks of that microbatch at other stages; flagged tensors are not learned from.
What the paper does not state, this file chooses: the formulas of the distances (`verifier.features`), `any` of the
four, k, the window, the count. k = 3 is Tukey's fence for "far out" points: with four heavy-tailed distances it gives
roughly the false-positive rate below 1% that the paper aims at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from protocol.votes import Verdict
from verifier import features
from verifier.baseline import MeanTensor
from verifier.conformal import Window
from verifier.detector import Court, Detector
from verifier.ladder import Standing
from verifier.roster import Roster, in_turns
from verifier.streams import Ban, Direction, Floats, Hops, Judgement, Mask, Peer, Stream
from verifier.violations import ViolationCounter


@dataclass(frozen=True)
class MarginalSettings:
    """`memory` is the EMA's beta per step, that is per call of `judge`; `warmup` the honest rounds that only build the
    baseline; `multiplier` the fence's k; `window` the distances a fence is made of; `peers` how many are monitored."""

    warmup: int = 0
    memory: dict[Direction, float] = field(
        default_factory=lambda: {Direction.ACTIVATION: 0.9, Direction.GRADIENT: 0.8}
    )
    multiplier: float = 3.0
    window: int = 512
    peers: int = 1024


class _Baseline:
    def __init__(self, memory: float, window: int) -> None:
        self.mean = MeanTensor(memory)
        self.distances = Window(len(features.MARGINAL), window)

    def fences(self, multiplier: float) -> Floats:
        """(4,) the highest distance that is not flagged."""
        low, high = np.quantile(self.distances.values(), [0.25, 0.75], axis=0)
        fences: Floats = high + multiplier * (high - low)
        return fences


class Marginal(Detector):
    """Flags, counts and bans by the four distances alone."""

    # Distances known before a fence means anything.
    enough = 40

    def __init__(self, settings: MarginalSettings | None = None) -> None:
        self.settings = settings or MarginalSettings()
        self._baselines: dict[Stream, _Baseline] = {}
        self._violations = ViolationCounter(self.settings.peers)
        self._banned = np.zeros(self.settings.peers, dtype=np.bool_)
        self._roster = Roster(self.settings.peers, self._forget)
        self._suspended: dict[int, int] = {}
        self._round = -1

    def judge(self, hops: Hops, court: Court) -> Judgement:
        if hops.round != self._round:
            self._round, self._suspended = hops.round, {}
        state = self._baselines.setdefault(
            hops.stream, _Baseline(self.settings.memory[hops.direction], self.settings.window)
        )
        distances = self._distances(hops, state)
        suspended = np.array(
            [self._suspended.get(one, hops.stage) != hops.stage for one in hops.microbatches]
        )
        flagged = self._flag(hops, state, distances) & ~suspended
        self._suspend(hops, flagged, suspended)
        self._learn(hops, state, distances, ~flagged & ~suspended)
        return Judgement(flagged, self._count(hops, flagged, suspended))

    def standing(self, peer: Peer) -> Standing:
        row = self._roster.find(peer)
        banned = row is not None and bool(self._banned[row])
        return Standing(Verdict.BANNED if banned else Verdict.OK)

    def _distances(self, hops: Hops, state: _Baseline) -> Floats:
        mean: Tensor = hops.outputs.mean((0, 1)) if state.mean.value is None else state.mean.value
        directions = features.projections(hops.outputs.shape[-1])
        distances = features.marginal_distances(hops.outputs, mean, directions)
        return np.where(hops.delivered[:, None] & np.isfinite(distances), distances, np.inf)

    def _flag(self, hops: Hops, state: _Baseline, distances: Floats) -> Mask:
        if hops.round < self.settings.warmup or len(state.distances) < self.enough:
            return np.asarray(~np.isfinite(distances).all(axis=1))
        return np.asarray((distances > state.fences(self.settings.multiplier)).any(axis=1))

    def _suspend(self, hops: Hops, flagged: Mask, suspended: Mask) -> None:
        """A flagged microbatch is not checked elsewhere, until its stage delivers a tensor that passes."""
        for microbatch, was_flagged, was_suspended in zip(hops.microbatches, flagged, suspended, strict=True):
            if was_flagged:
                self._suspended[microbatch] = hops.stage
            elif not was_suspended:
                self._suspended.pop(microbatch, None)

    def _learn(self, hops: Hops, state: _Baseline, distances: Floats, accepted: Mask) -> None:
        accepted = accepted & np.isfinite(distances).all(1)
        if accepted.any():
            state.mean.update(hops.outputs[torch.from_numpy(accepted)].mean((0, 1)), 1)
            state.distances.admit(distances[accepted])

    def _count(self, hops: Hops, flagged: Mask, suspended: Mask) -> tuple[Ban, ...]:
        rows = self._roster.rows(hops.peers)
        if hops.round < self.settings.warmup:
            return ()
        for places in in_turns(rows):
            places = places[~suspended[places]]
            self._violations.count(rows[places], flagged[places])
        bans = []
        for place in np.flatnonzero((self._violations.share(rows) >= 1) & ~self._banned[rows]):
            if not self._banned[rows[place]]:
                self._banned[rows[place]] = True
                bans.append(Ban(hops.peers[place], hops.stage, hops.round, "too many flags"))
        return tuple(bans)

    def _forget(self, row: int) -> None:
        self._violations.forget(row)
        self._banned[row] = False
