"""Synthetic streams for tests: a stage is a random residual map, its replicas answer for different inputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verifier.detector import Hearing
from verifier.streams import Direction, Hops, quorum_of

WIDTH, TOKENS, BATCH = 16, 24, 2


class Stage:
    """y = x + 0.3 tanh(x M), drawn from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(WIDTH, WIDTH, generator=self.generator) / WIDTH**0.5

    def inputs(self, count: int) -> Tensor:
        own = torch.randn(count, BATCH, TOKENS, WIDTH, generator=self.generator)
        return own + torch.linspace(-1, 1, WIDTH)

    def outputs(self, inputs: Tensor) -> Tensor:
        return inputs + 0.3 * torch.tanh(inputs @ self.matrix)


def hops(
    inputs: Tensor,
    outputs: Tensor,
    round: int,
    peers: list[str],
    stage: int = 1,
    direction: Direction = Direction.ACTIVATION,
) -> Hops:
    microbatches = tuple(range(len(peers)))
    delivered = np.ones(len(peers), dtype=np.bool_)
    return Hops(stage, direction, round, tuple(peers), microbatches, inputs, outputs, delivered)


class NoCourt:
    """Nobody can recompute; `replicas` serve the stage."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def quorum(self, hops: Hops) -> int:
        return quorum_of(self.replicas)

    def most(self, hops: Hops) -> float:
        return float("inf")

    def hear(self, hops: Hops, row: int) -> Hearing:
        raise AssertionError("nobody can pay for this")
