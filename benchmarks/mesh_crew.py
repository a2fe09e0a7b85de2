"""The mesh's workers: who is malicious, who colludes, who is banned, and who gets which microbatch."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
import numpy.typing as npt

from benchmarks.mesh_config import MeshConfig
from protocol.votes import Verdict
from verifier.detector import Detector
from verifier.saboteur import Orders, Saboteur, parse_attack
from verifier.streams import Direction, Peer, StageIndex

Replica = int
Worker = tuple[StageIndex, Replica]

_RING_SEED = 1_000_003


def peer_name(worker: Worker) -> Peer:
    return f"{worker[0]}/{worker[1]}"


class Crew:
    """Placement of attackers and routing of microbatches. Everything random in it follows from the seed."""

    def __init__(self, config: MeshConfig) -> None:
        self.config = config
        self.banned: set[Worker] = set()
        self._random = np.random.default_rng((config.seed, 1))
        self.saboteurs = self._recruit() if config.attack else {}
        self.ring = self._form_ring()

    def _recruit(self) -> dict[Worker, Saboteur]:
        config = self.config
        make = parse_attack(config.attack or "")
        orders = Orders(config.directions, config.warmup, config.duty)
        count = math.floor(config.fraction * config.replicas + 1e-9)
        places: list[Worker] = []
        for stage in range(config.stages):
            if self._can_attack(stage):
                chosen = self._random.permutation(config.replicas)[:count]
                places += [(stage, int(replica)) for replica in sorted(chosen)]
        order = self._random.permutation(len(places))
        self._colluding = {places[index] for index in order[: round(config.collusion * len(places))]}
        saboteurs = {}
        for number, place in enumerate(places):
            # One seed for all colluders: they corrupt in the same rounds and in the same way.
            seed = _RING_SEED if place in self._colluding else config.seed * 100_003 + number
            saboteurs[place] = Saboteur(make(seed), orders, seed)
        return saboteurs

    def _can_attack(self, stage: StageIndex) -> bool:
        """Ends only if asked for; and a head sends no gradients, a tail no activations."""
        last = self.config.stages - 1
        if 0 < stage < last:
            return True
        needed = Direction.ACTIVATION if stage == 0 else Direction.GRADIENT
        return self.config.malicious_ends and needed in self.config.directions

    def _form_ring(self) -> frozenset[Worker]:
        return frozenset(self._colluding) if self.saboteurs else frozenset()

    @property
    def weight_memory(self) -> int:
        return max((saboteur.weight_memory for saboteur in self.saboteurs.values()), default=0)

    def active(self, stage: StageIndex) -> list[Replica]:
        """The replicas of a stage that are not banned."""
        return [replica for replica in range(self.config.replicas) if (stage, replica) not in self.banned]

    def assign(self, stage: StageIndex) -> npt.NDArray[np.int64]:
        """(M,) the replica that each of the round's microbatches goes to: everyone's share is as equal as can be.

        `random` wiring draws anew each round; `fixed` keeps microbatch m on replica m while that one is there. -1 where
        the stage has no replica left.
        """
        count, active = self.config.replicas, self.active(stage)
        if not active:
            return np.full(count, -1, dtype=np.int64)
        if self.config.wiring == "random":
            rows = -(-count // len(active))
            return np.concatenate([self._random.permutation(active) for _ in range(rows)])[:count]
        spare = cycle(active)
        own = [index if index in active else next(spare) for index in range(count)]
        return np.asarray(own, dtype=np.int64)

    def another(self, stage: StageIndex, tried: set[Replica], detector: Detector) -> Replica | None:
        """A replica to retry on, not one of `tried`: of those in good standing, or else of all, at random."""
        free = [replica for replica in self.active(stage) if replica not in tried]
        good = [one for one in free if detector.standing(peer_name((stage, one))).verdict is Verdict.OK]
        choice = good or free
        return int(self._random.choice(choice)) if choice else None
