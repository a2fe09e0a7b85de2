"""What nodes show of a sampled microbatch, checked: whose tensor it is, and whether it hangs together. Pure.

Every tensor is shown by who was sent it, with the receipt that its sender signed. A stage's output is thus shown by the
next stage, and its input by itself: whoever shows for its input anything else than what it swore to have worked on
exposes itself, and nobody can show what a neighbour never signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.codec import Buffer, TensorHeader, decode_tensor, digest
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.receipts import Direction, MicrobatchId, Receipt, SignedReceipt
from verifier.streams import StageIndex

_CPU = torch.device("cpu")
_LEAF = 32


@dataclass(frozen=True)
class Exhibit:
    """One sequence of a tensor that was sent: `sequence` is its wire bytes, `labels` that of an activation's labels."""

    signed: SignedReceipt
    sequence: Buffer
    labels: Buffer
    tensor: Tensor
    """(1, T, W), fp32."""

    @property
    def receipt(self) -> Receipt:
        return self.signed.receipt


@dataclass(frozen=True)
class Question:
    """What a node was asked to show: the `sequence`-th of what it was sent in this `direction`, as stage `stage`."""

    run: bytes
    holder: PeerId
    stage: StageIndex
    microbatch: MicrobatchId
    direction: Direction
    sequence: int

    @property
    def sender_stage(self) -> StageIndex:
        return self.stage - 1 if self.direction is Direction.ACTIVATION else self.stage + 1


def exhibit_size(direction: Direction, header: TensorHeader) -> int:
    """Bytes of an exhibit: leaves, one sequence, and of an activation all labels."""
    sequences, context, _ = header.shape
    size = _LEAF * sequences + header.size // sequences
    return size + (_LEAF + 4 * sequences * context if direction is Direction.ACTIVATION else 0)


def read_exhibit(question: Question, signed: SignedReceipt, shown: Buffer, header: TensorHeader) -> Exhibit:
    """Check what was shown. All failures are the holder's doing.

    The checks, in order: run, microbatch, direction, recipient, stage, signature of the receipt; size; the leaves
    against the receipt, and sequence and labels against the leaves. Raises `ProtocolError`.
    """
    _check_receipt(question, signed)
    sequences, context, _ = header.shape
    if len(shown) != exhibit_size(question.direction, header):
        raise ProtocolError(Reason.MALFORMED, f"an exhibit of {len(shown)} bytes")
    size, has_labels = header.size // sequences, question.direction is Direction.ACTIVATION
    leaves_size = _LEAF * (sequences + has_labels)
    leaves, rest = shown[:leaves_size], shown[leaves_size:]
    sequence, labels = rest[:size], rest[size:]
    at = _LEAF * question.sequence
    is_whole = digest(leaves) == signed.receipt.output and digest(sequence) == leaves[at : at + _LEAF]
    if not is_whole or (has_labels and digest(labels) != leaves[-_LEAF:]):
        raise ProtocolError(Reason.WRONG_DIGEST, "an exhibit that its receipt does not name")
    row = TensorHeader(header.codec, (1, *header.shape[1:]))
    own = labels[4 * context * question.sequence : 4 * context * (question.sequence + 1)]
    return Exhibit(signed, sequence, own, decode_tensor(sequence, row, _CPU))


def _check_receipt(question: Question, signed: SignedReceipt) -> None:
    receipt = signed.receipt
    if receipt.run != question.run:
        raise ProtocolError(Reason.FOREIGN_RUN)
    if receipt.microbatch != question.microbatch or receipt.direction is not question.direction:
        raise ProtocolError(Reason.UNSOLICITED, "another tensor than was asked for")
    if receipt.recipient != question.holder:
        raise ProtocolError(Reason.WRONG_PEER, f"a receipt for {receipt.recipient}")
    if receipt.stage != question.sender_stage:
        raise ProtocolError(Reason.WRONG_STAGE, f"stage {receipt.stage}")
    signed.check_signed()


@dataclass(frozen=True)
class Work:
    """What one peer did of a microbatch: its output as the next one was sent it, and what it says that it is made of.

    `source` is the input in the same direction (None of a head's activation or a tail's gradient); `forward` the
    activation that the peer had been sent, of which a gradient is made too.
    """

    peer: PeerId
    stage: StageIndex
    direction: Direction
    sequence: int
    state: bytes | None
    """The weights that the peer said it had used, before this was looked at; None if it said nothing."""
    output: Exhibit
    source: Exhibit | None
    forward: Exhibit | None

    @property
    def receipt(self) -> Receipt:
        return self.output.receipt

    @property
    def is_heads(self) -> bool:
        """Whether it is a head's activation, which is made of samples that any head can draw."""
        return self.stage == 0 and self.direction is Direction.ACTIVATION

    @property
    def is_relabelled(self) -> bool:
        """Whether an activation went on with other labels than had come with its input: what its sender has signed."""
        if self.direction is Direction.GRADIENT or self.source is None:
            return False
        return bytes(self.output.labels) != bytes(self.source.labels)

    @property
    def evidence(self) -> bytes:
        """The digest of the receipts that this rests on."""
        parts = (one for one in (self.output, self.source, self.forward) if one is not None)
        return digest(*(one.signed.signature for one in parts))


@dataclass(frozen=True)
class Exposure:
    """A peer whose own receipt contradicts what it shows, or does not show."""

    peer: PeerId
    stage: StageIndex
    problem: str


Shown = Mapping[tuple[StageIndex, Direction], Exhibit]
"""By the stage that was sent the tensor, and the tensor's direction."""


def works_of(
    shown: Shown, stages: int, sequence: int, states: Mapping[PeerId, bytes]
) -> tuple[list[Work], list[Exposure]]:
    """Every stage's work on one microbatch that can be judged, and who shows what it did not work on.

    A work whose input was not shown is left out: who owes it is held to account for not showing it.
    """
    works: list[Work] = []
    exposures: list[Exposure] = []
    for stage in range(stages):
        for direction in Direction:
            work = _work(shown, stage, direction, stages, sequence, states)
            if isinstance(work, Work):
                works.append(work)
            elif work is not None:
                exposures.append(work)
    return works, exposures


def _work(
    shown: Shown,
    stage: StageIndex,
    direction: Direction,
    stages: int,
    sequence: int,
    states: Mapping[PeerId, bytes],
) -> Work | Exposure | None:
    is_forward = direction is Direction.ACTIVATION
    output = shown.get((stage + 1 if is_forward else stage - 1, direction))
    if output is None:
        return None
    peer = PeerId(output.receipt.sender)
    source, forward = shown.get((stage, direction)), shown.get((stage, Direction.ACTIVATION))
    is_first, is_last = stage == 0, stage == stages - 1
    sworn = output.receipt.input
    # On the tail a gradient is made of the activation.
    made_of = forward if is_last and not is_forward else source
    if not (is_first and is_forward):
        if made_of is None:
            return None
        if made_of.receipt.recipient != peer or made_of.receipt.output != sworn:
            return Exposure(peer, stage, f"its {direction} swears to another input than it shows")
    if not is_forward and not is_first and (forward is None or forward.receipt.recipient != peer):
        return None
    return Work(
        peer, stage, direction, sequence, states.get(peer), output, source, None if is_first else forward
    )
