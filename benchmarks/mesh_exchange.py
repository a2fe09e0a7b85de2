"""One boundary of the mesh: what workers send, what is made of it, and who is asked instead."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.mesh_config import MeshConfig
from benchmarks.mesh_court import MeshCourt
from benchmarks.mesh_crew import Crew, peer_name
from protocol.votes import Verdict
from verifier.attacks import View
from verifier.detector import Detector
from verifier.streams import Ban, Direction, Hops, Judgement, Mask, StageIndex, quorum_of

Rows = npt.NDArray[np.intp]
Redo = Callable[[int, int], Tensor]
"""(microbatch, versions ago) -> the honest tensor on those weights."""


@dataclass(frozen=True)
class Crossing:
    """All that is about to cross one boundary in one round: M microbatches, (M, B, T, W) each.

    `workers` (M,) hold the microbatches and change when one is given to another; -1 is nobody. `received` is what the
    workers see as their input, `inputs` what a verifier sees of it (at the head tokens, at the tail labels), `honest`
    what they should send.
    """

    stage: StageIndex
    direction: Direction
    round: int
    workers: npt.NDArray[np.int64]
    received: Tensor
    inputs: Tensor | None
    honest: Tensor
    redo: Redo


@dataclass
class Tally:
    """What happened at all boundaries so far."""

    honest_hops: int = 0
    honest_refused: int = 0
    corrupt_hops: int = 0
    corrupt_refused: int = 0
    retried: int = 0
    dropped: int = 0
    verify_seconds: float = 0.0
    verify_cpu_seconds: float = 0.0
    bans: list[Ban] = field(default_factory=list)


class Boundary:
    """Hands one stage's tensors on. A refused one goes to another replica of the stage, which holds the same weights
    and is given the same input by the sender, who still has it; after `retries` of these its microbatch is dropped, but
    not before so many have had it that the honest among them could confirm one another."""

    def __init__(self, config: MeshConfig, crew: Crew, detector: Detector, court: MeshCourt) -> None:
        self._config = config
        self._crew = crew
        self._detector = detector
        self._court = court
        self._attempts = max(config.retries + 1, quorum_of(config.replicas))
        self._sampler = np.random.default_rng((config.seed, 3))
        self.tally = Tally()

    def pass_on(self, crossing: Crossing, active: Mask) -> tuple[Tensor, Mask]:
        """What arrives (M, B, T, W), and which of the `active` microbatches (M,) are still alive."""
        passed, alive, workers = crossing.honest, active.copy(), crossing.workers
        tried: dict[int, set[int]] = {}
        pending = np.flatnonzero(active)
        for attempt in range(self._attempts):
            pending = self._place(crossing, pending, tried, retry=attempt > 0)
            if not len(pending):
                break
            sent = self._send(crossing, pending)
            refused = self._judge(sent, is_retry=attempt > 0)
            usable = ~refused & sent.delivered & _finite(sent.outputs)
            if len(pending) == len(passed) and usable.all():
                passed = sent.outputs
            else:
                passed = passed.clone() if passed is crossing.honest else passed
                passed[pending[usable]] = sent.outputs[usable]
            # What is unusable though nobody refused it is lost: without a detector there is no one to ask for a retry.
            alive[pending[~refused & ~usable]] = False
            pending = pending[refused]
        alive[pending] = False
        alive &= workers >= 0
        self.tally.dropped += int(active.sum() - alive.sum())
        if not alive.all():
            passed = torch.where(torch.from_numpy(alive)[:, None, None, None], passed, 0.0)
        return passed, alive

    def _place(self, crossing: Crossing, pending: Rows, tried: dict[int, set[int]], *, retry: bool) -> Rows:
        """Give refused microbatches, and those of workers banned meanwhile, to another replica; those that have one."""
        placed, workers, stage = [], crossing.workers, crossing.stage
        for row in pending.tolist():
            before = tried.setdefault(row, set())
            if retry or (stage, int(workers[row])) in self._crew.banned:
                self.tally.retried += retry
                found = self._crew.another(stage, before, self._detector)
                workers[row] = -1 if found is None else found
            if workers[row] >= 0:
                before.add(int(workers[row]))
                placed.append(row)
        return np.asarray(placed, dtype=np.intp)

    def _send(self, crossing: Crossing, pending: Rows) -> Hops:
        """The hops as they arrive from the workers, corrupted or not."""
        everyone = len(pending) == len(crossing.honest)
        outputs = crossing.honest.clone() if everyone else crossing.honest[pending]
        delivered = np.ones(len(pending), dtype=np.bool_)
        for place, row in enumerate(pending.tolist()):
            sent = self._corrupt(crossing, row)
            if sent is None:
                continue
            delivered[place] = sent.shape == outputs[place].shape
            if delivered[place]:
                outputs[place] = sent
        return Hops(
            crossing.stage,
            crossing.direction,
            crossing.round,
            tuple(peer_name((crossing.stage, int(crossing.workers[row]))) for row in pending),
            tuple(pending.tolist()),
            crossing.inputs if everyone or crossing.inputs is None else crossing.inputs[pending],
            outputs,
            delivered,
        )

    def _corrupt(self, crossing: Crossing, row: int) -> Tensor | None:
        """What a malicious worker sends for a microbatch; None from an honest one, who sends the honest output."""
        worker = (crossing.stage, int(crossing.workers[row]))
        saboteur = self._crew.saboteurs.get(worker)
        if saboteur is None:
            return None
        view = View(
            crossing.direction,
            crossing.stage,
            crossing.round,
            row,
            peer_name(worker),
            crossing.received[row],
            saboteur.state(crossing.direction),
            partial(crossing.redo, row),
        )
        return saboteur.send(crossing.honest[row], view)

    def _judge(self, hops: Hops, *, is_retry: bool) -> Mask:
        """Have the hops judged, if sampled, and carry out the bans. (N,) which hops are refused."""
        begun, cpu = time.perf_counter(), time.process_time()
        refused: Mask = np.zeros(len(hops), dtype=np.bool_)
        if is_retry or self._is_sampled(hops):
            judgement: Judgement = self._detector.judge(hops, self._court)
            refused = judgement.refused
            self._enforce(judgement)
        self.tally.verify_seconds += time.perf_counter() - begun
        self.tally.verify_cpu_seconds += time.process_time() - cpu
        self._count(hops, refused)
        return refused

    def _is_sampled(self, hops: Hops) -> bool:
        """A random share of steps, and those in which a suspect has part or the guard finds something odd.

        Whole steps, so that the replicas of one moment can be compared, as in a live verifier's panels.
        """
        if self._config.sampling >= 1 or self._sampler.random() < self._config.sampling:
            return True
        if any(self._detector.standing(peer).verdict is not Verdict.OK for peer in hops.peers):
            return True
        return bool(self._detector.guard(hops).any())

    def _enforce(self, judgement: Judgement) -> None:
        for ban in judgement.bans:
            stage, replica = (int(part) for part in ban.peer.split("/"))
            if (stage, replica) not in self._crew.banned:
                self._crew.banned.add((stage, replica))
                self.tally.bans.append(ban)

    def _count(self, hops: Hops, refused: Mask) -> None:
        for peer, was_refused in zip(hops.peers, refused, strict=True):
            stage, replica = (int(part) for part in peer.split("/"))
            saboteur = self._crew.saboteurs.get((stage, replica))
            if saboteur is not None and saboteur.acts(hops.direction, hops.round):
                self.tally.corrupt_hops += 1
                self.tally.corrupt_refused += bool(was_refused)
            elif saboteur is None:
                self.tally.honest_hops += 1
                self.tally.honest_refused += bool(was_refused)


def _finite(outputs: Tensor) -> Mask:
    # A sum of finite numbers that is not finite is of numbers that no stage makes.
    finite: Mask = outputs.flatten(1).sum(1).isfinite().numpy()
    return finite
