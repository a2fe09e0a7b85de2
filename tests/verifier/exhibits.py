"""One microbatch's way through three stages, receipted as nodes do it, with peers that a test can make lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocol.codec import TensorHeader, bytes_of, leaves_of, payload_digest
from protocol.identity import Identity, PeerId
from protocol.receipts import Direction, MicrobatchId, Receipt, SignedReceipt
from verifier.exhibits import Exhibit, Question, read_exhibit
from verifier.streams import StageIndex

STAGES, SEQUENCES, TOKENS, WIDTH = 3, 2, 8, 4
HEADER = TensorHeader("fp32", (SEQUENCES, TOKENS, WIDTH))
RUN = b"r" * 32
LABELS = bytes_of(torch.arange(SEQUENCES * TOKENS, dtype=torch.int32).view(SEQUENCES, TOKENS))
Key = tuple[StageIndex, Direction]


@dataclass
class Sent:
    """A tensor as its receiver holds it."""

    signed: SignedReceipt
    parts: tuple[memoryview, ...]

    def blob(self, sequence: int) -> memoryview:
        """What its receiver shows of it."""
        tensor, *labels = self.parts
        size = len(tensor) // SEQUENCES
        row = tensor[sequence * size : (sequence + 1) * size]
        return memoryview(bytearray(b"".join((*leaves_of(HEADER, tensor, *labels), row, *labels))))


@dataclass
class Trip:
    """By receiving stage and direction: what was sent there. Honest, until a test replaces something."""

    people: list[Identity] = field(default_factory=lambda: [Identity.generate() for _ in range(STAGES)])
    sent: dict[Key, Sent] = field(default_factory=dict)
    slot: int = 7

    def __post_init__(self) -> None:
        self.microbatch = MicrobatchId(self.peer(0), self.slot)
        self.send(0, 1, Direction.ACTIVATION, made_of=b"t" * 32)
        self.send(1, 2, Direction.ACTIVATION)
        self.send(2, 1, Direction.GRADIENT, made_of=self.output_digest(2, Direction.ACTIVATION))
        self.send(1, 0, Direction.GRADIENT)

    def peer(self, stage: StageIndex) -> PeerId:
        return self.people[stage].peer_id

    def output_digest(self, stage: StageIndex, direction: Direction) -> bytes:
        return self.sent[stage, direction].signed.receipt.output

    def send(
        self,
        sender: StageIndex,
        receiver: StageIndex,
        direction: Direction,
        *,
        tensor: Tensor | None = None,
        made_of: bytes | None = None,
        signer: Identity | None = None,
        labels: memoryview = LABELS,
        **changes: Any,
    ) -> Sent:
        """Receipt a tensor and hand it over; made of what the sender was sent, unless told otherwise."""
        own = torch.randn(HEADER.shape) if tensor is None else tensor
        parts = (bytes_of(own), labels) if direction is Direction.ACTIVATION else (bytes_of(own),)
        content: dict[str, Any] = {
            "run": RUN,
            "microbatch": self.microbatch,
            "direction": direction,
            "stage": sender,
            "version": 3,
            "input": made_of or self.output_digest(sender, direction),
            "output": payload_digest(HEADER, *parts),
            "sender": self.peer(sender),
            "recipient": self.peer(receiver),
        }
        signed = SignedReceipt.sign(Receipt(**{**content, **changes}), signer or self.people[sender])
        self.sent[receiver, direction] = Sent(signed, parts)
        return self.sent[receiver, direction]

    def question(self, stage: StageIndex, direction: Direction, sequence: int = 0) -> Question:
        return Question(RUN, self.peer(stage), stage, self.microbatch, direction, sequence)

    def show(self, stage: StageIndex, direction: Direction, sequence: int = 0) -> Exhibit:
        held = self.sent[stage, direction]
        return read_exhibit(
            self.question(stage, direction, sequence), held.signed, held.blob(sequence), HEADER
        )

    def show_all(self) -> dict[Key, Exhibit]:
        return {key: self.show(*key) for key in self.sent}
