"""The mesh experiment: a data-parallel x pipeline-parallel training run with attackers, in one process.

Replicas of a stage share weights, so one batched forward and backward with per-worker corruption at the stage
boundaries *is* the mesh. Every tensor is judged before it is used, as in the paper (its verifiers sit between stages);
bans take effect at once, and refused tensors are made again by another replica.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.mesh_config import MeshConfig
from benchmarks.mesh_court import COST, MeshCourt
from benchmarks.mesh_crew import Crew
from benchmarks.mesh_data import MeshData
from benchmarks.mesh_exchange import Boundary, Crossing, Tally
from benchmarks.mesh_stage import MeshOptimizer, MeshStage
from verifier.detector import Detector
from verifier.registry import make_detector
from verifier.streams import Direction, Mask

Workers = npt.NDArray[np.int64]
"""(stages, M): the replica that has each microbatch at each stage."""
Progress = Callable[[int], None]
"""Called after each round with its number."""


@dataclass
class MeshRun:
    """What a run left behind. `losses` are (round, validation loss in nats per token)."""

    config: MeshConfig
    crew: Crew
    tally: Tally
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    rounds: int = 0
    recompute_fraction: float = 0.0


class Mesh:
    """The state of one run: stages, crew, detector. `play` is one round."""

    def __init__(self, config: MeshConfig, detector: Detector) -> None:
        manifest = config.manifest()
        self.config = config
        self.crew = Crew(config)
        self.data = MeshData(manifest)
        memory = self.crew.weight_memory
        self.stages = [MeshStage(manifest, index, memory) for index in range(config.stages)]
        self.optimizer = MeshOptimizer(manifest, self.stages)
        self.court = MeshCourt(self.crew, self.stages, config.seed)
        self.boundary = Boundary(config, self.crew, detector, self.court)
        self.work = 0.0

    def play(self, round: int) -> None:
        """One round: every replica's microbatch forward, back, and one optimizer step a stage."""
        config = self.config
        samples = self.data.draw(round * config.replicas, config.replicas)
        samples = samples.view(config.replicas, config.microbatch, -1)
        tokens, labels = samples[..., :-1], samples[..., 1:]
        for stage in self.stages:
            stage.begin_round()
        workers = np.stack([self.crew.assign(stage) for stage in range(config.stages)])
        arrived, alive = self._forward(round, tokens, workers)
        if alive.any():
            self._backward(round, arrived, labels, alive, workers)
        self.optimizer.step(round)

    def _forward(self, round: int, tokens: Tensor, workers: Workers) -> tuple[Tensor, Mask]:
        arrived, alive = tokens, np.ones(len(tokens), dtype=np.bool_)
        for stage in self.stages[:-1]:
            honest = stage.forward(arrived)
            # A head receives tokens, of which no output can be a small change: attackers see their own output instead.
            received = honest if stage.index == 0 else arrived
            self.work += COST[Direction.ACTIVATION] * int(alive.sum())
            crossing = Crossing(
                stage.index,
                Direction.ACTIVATION,
                round,
                workers[stage.index],
                received,
                arrived,
                honest,
                stage.redo_activation,
            )
            arrived, alive = self.boundary.pass_on(crossing, alive)
        return arrived, alive

    def _backward(self, round: int, arrived: Tensor, labels: Tensor, alive: Mask, workers: Workers) -> None:
        try:
            honest = self.stages[-1].loss_backward(arrived, labels, torch.from_numpy(alive))
        except ValueError:
            return  # The loss overflowed: nothing to learn from this round.
        # A tail receives activations and labels; its gradient has no input of its own kind, so the labels stand for it.
        received, inputs = arrived, labels
        for stage in reversed(self.stages[1:]):
            self.work += 2 * COST[Direction.ACTIVATION] * int(alive.sum())
            crossing = Crossing(
                stage.index,
                Direction.GRADIENT,
                round,
                workers[stage.index],
                received,
                inputs,
                honest,
                stage.redo_gradient,
            )
            received, alive = self.boundary.pass_on(crossing, alive)
            inputs = received
            gradient = self.stages[stage.index - 1].backward(received, torch.from_numpy(alive))
            honest = received if gradient is None else gradient

    def validation_loss(self) -> float:
        """Nats per token on the held-out text, by the honest weights."""
        hidden, labels = self.data.validation[:, :-1], self.data.validation[:, 1:]
        with torch.no_grad():
            for stage in self.stages[:-1]:
                hidden = stage.module(hidden)
            return float(self.stages[-1].module.loss(hidden, labels))


def run_mesh(config: MeshConfig, progress: Progress = lambda _: None) -> MeshRun:
    """Train with attackers and a detector for `config.rounds` rounds."""
    mesh = Mesh(config, make_detector(config.detector, config.warmup))
    run = MeshRun(config, mesh.crew, mesh.boundary.tally)
    for round in range(config.rounds):
        begun, cpu = time.perf_counter(), time.process_time()
        mesh.play(round)
        run.seconds += time.perf_counter() - begun
        run.cpu_seconds += time.process_time() - cpu
        run.rounds += 1
        if (round + 1) % config.evaluate_every == 0 or round + 1 == config.rounds:
            run.losses.append((round + 1, mesh.validation_loss()))
        progress(round)
    run.recompute_fraction = mesh.court.spent / mesh.work if mesh.work else 0.0
    return run
