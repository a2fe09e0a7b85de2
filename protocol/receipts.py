"""Receipts: every hop of a microbatch is signed by its sender, and the receipts of a path chain.

The output digest of one hop is the input digest of the next. So the blame for a bad tensor cannot be shifted
to an honest neighbour, and evidence can be checked again by anyone: digests are of the wire bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from protocol import wire
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId, check_signature
from protocol.wire import Digest, Natural, PeerName, Signature, StageField

DOMAIN = b"sentinel/receipt/1"
MAX_ATTEMPT = 15


class Direction(StrEnum):
    """Which way a tensor goes: activations from head to tail, gradients back."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


class MicrobatchId(wire.Message, frozen=True):
    """One trip of one slot's samples through the stages.

    `slot` numbers the run's microbatches; its samples are a function of (manifest, slot) alone.
    `head` is the stage-0 peer that injected it; `attempt` counts re-injections of a lost slot.
    """

    head: PeerName
    slot: Natural
    attempt: Annotated[int, msgspec.Meta(ge=0, le=MAX_ATTEMPT)] = 0

    def __str__(self) -> str:
        return f"{self.slot}.{self.attempt}@{self.head[-6:]}"


class Receipt(wire.Message, frozen=True):
    """What a sender swears: at `stage`, with `version` of the weights, it got `input` and sent `output`.

    `input` and `output` are digests of wire payloads. On the head, the input of an activation is the digest of
    the token ids; on the tail, the input of a gradient is the activation's payload.
    """

    run: Digest
    microbatch: MicrobatchId
    direction: Direction
    stage: StageField
    version: Natural
    input: Digest
    output: Digest
    sender: PeerName
    recipient: PeerName


class SignedReceipt(wire.Message, frozen=True):
    receipt: Receipt
    signature: Signature

    @classmethod
    def sign(cls, receipt: Receipt, identity: Identity) -> SignedReceipt:
        return cls(receipt, identity.sign(DOMAIN, wire.encode(receipt)))

    def check_signed(self) -> None:
        """Raises `ProtocolError` (bad_signature) unless its sender signed it."""
        check_signature(self.receipt.sender, DOMAIN, wire.encode(self.receipt), self.signature)


def check_hop(signed: SignedReceipt, *, run: bytes, sender: PeerId, recipient: PeerId, stage: int) -> None:
    """Check a receipt that came with a tensor: is it of this run, this hop, and signed?

    The checks, in order, each REJECT: run, sender, recipient, stage, signature. Raises `ProtocolError`.
    """
    receipt = signed.receipt
    if receipt.run != run:
        raise ProtocolError(Reason.FOREIGN_RUN)
    if receipt.sender != sender:
        raise ProtocolError(Reason.WRONG_PEER, f"receipt of {receipt.sender} from {sender}")
    if receipt.recipient != recipient:
        raise ProtocolError(Reason.WRONG_PEER, f"receipt for {receipt.recipient}")
    if receipt.stage != stage:
        raise ProtocolError(Reason.WRONG_STAGE, f"stage {receipt.stage}, expected {stage}")
    signed.check_signed()


def is_chained(earlier: Receipt, later: Receipt) -> bool:
    """Whether `later` says it worked on what `earlier` says was sent: the link of evidence between two hops."""
    return (
        earlier.run == later.run
        and earlier.microbatch == later.microbatch
        and earlier.direction == later.direction
        and earlier.recipient == later.sender
        and earlier.output == later.input
    )
