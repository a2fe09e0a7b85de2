"""Recomputation by other replicas of a stage: the mesh's side of `verifier.detector.Court`."""

from __future__ import annotations

import numpy as np

from benchmarks.mesh_crew import Crew, Worker
from benchmarks.mesh_stage import MeshStage
from verifier.audit import agrees
from verifier.detector import Hearing
from verifier.streams import Direction, Hops, quorum_of

# In forward passes: to check a gradient, the forward pass is needed again and the backward pass costs two.
COST = {Direction.ACTIVATION: 1.0, Direction.GRADIENT: 3.0}


class MeshCourt:
    """One replica recomputes; if it differs, others do, until a majority of the stage is against the suspect.

    Honest replicas, and attackers outside the ring, answer what they compute: to be caught lying in court is worse
    than to work. Colluders vouch for what a colluder sent, and otherwise work too.
    """

    def __init__(self, crew: Crew, stages: list[MeshStage], seed: int) -> None:
        self._crew = crew
        self._stages = stages
        self._random = np.random.default_rng((seed, 2))
        self.spent = 0.0

    def quorum(self, hops: Hops) -> int:
        return quorum_of(len(self._crew.active(hops.stage)))

    def most(self, hops: Hops) -> float:
        return COST[hops.direction] * (len(self._crew.active(hops.stage)) - 1)

    def hear(self, hops: Hops, row: int) -> Hearing:
        stage, replica = (int(part) for part in hops.peers[row].split("/"))
        others = [(stage, one) for one in self._crew.active(stage) if one != replica]
        if not others:
            return Hearing(None, 0.0)
        matches = self._matches(hops, row)
        needed = self.quorum(hops)
        against = asked = 0
        for place in self._random.permutation(len(others)):
            asked += 1
            if matches or self._vouches(others[place], (stage, replica)):
                if asked == 1:
                    break
            else:
                against += 1
            if against == needed:
                break
        cost = COST[hops.direction] * asked
        self.spent += cost
        return Hearing(against >= needed, cost)

    def doubt(self, hops: Hops, row: int) -> Hearing:
        """One other replica, drawn by lot, redoes the hop."""
        stage, replica = (int(part) for part in hops.peers[row].split("/"))
        others = [(stage, one) for one in self._crew.active(stage) if one != replica]
        if not others:
            return Hearing(None, 0.0)
        other = others[int(self._random.integers(len(others)))]
        cost = COST[hops.direction]
        self.spent += cost
        agreed = self._matches(hops, row) or self._vouches(other, (stage, replica))
        return Hearing(False if agreed else None, cost)

    def _matches(self, hops: Hops, row: int) -> bool:
        if not hops.delivered[row]:
            return False
        stage = self._stages[hops.stage]
        redo = stage.redo_activation if hops.direction is Direction.ACTIVATION else stage.redo_gradient
        return agrees(hops.outputs[row], redo(hops.microbatches[row]))

    def _vouches(self, other: Worker, suspect: Worker) -> bool:
        return other in self._crew.ring and suspect in self._crew.ring
