"""The words of judging: who sent what to whom, and what was decided about it.

A *hop* is one tensor that one peer sent: its output, together with the input that it was made from. A stream is the
sequence of hops of one stage in one direction. Tensors are batched over hops: N hops of one stream at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from protocol.receipts import Direction as Direction

Peer: TypeAlias = str
"""A PeerID, or any name that is one peer's own."""
StageIndex: TypeAlias = int
Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

Stream: TypeAlias = tuple[StageIndex, Direction]


def quorum_of(replicas: int) -> int:
    """How many of a stage's replicas attackers can never be, as long as they are a minority of them."""
    return (replicas - 1) // 2 + 1


@dataclass(frozen=True)
class Hops:
    """N hops of one stream.

    `outputs` and `inputs` are (N, B, T, W) of any floating dtype: B sequences, T tokens, W wide. Where a head turned
    tokens into activations, or a tail labels into gradients, `inputs` are these, int64 (N, B, T). None for all if
    nobody can show what went in.
    `delivered` says which outputs arrived with the right shape; the rest of `outputs` is then of no meaning.
    """

    stage: StageIndex
    direction: Direction
    round: int
    peers: tuple[Peer, ...]
    microbatches: tuple[int, ...]
    inputs: Tensor | None
    outputs: Tensor
    delivered: Mask

    @property
    def stream(self) -> Stream:
        return self.stage, self.direction

    @property
    def from_tokens(self) -> bool:
        """Whether what went in are tokens or labels."""
        return self.inputs is not None and not self.inputs.is_floating_point()

    def __len__(self) -> int:
        return len(self.peers)

    def take(self, rows: npt.NDArray[np.intp]) -> Hops:
        """The hops at the given rows, in their order."""
        return Hops(
            self.stage,
            self.direction,
            self.round,
            tuple(self.peers[row] for row in rows),
            tuple(self.microbatches[row] for row in rows),
            None if self.inputs is None else self.inputs[rows],
            self.outputs[rows],
            self.delivered[rows],
        )


@dataclass(frozen=True)
class Ban:
    """A verdict that ends a peer's part in the run, with the reason in words."""

    peer: Peer
    stage: StageIndex
    round: int
    reason: str


@dataclass(frozen=True)
class Judgement:
    """What a detector decided about N hops: `refused` (N,) are not to be used; `bans` are new."""

    refused: Mask
    bans: tuple[Ban, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
