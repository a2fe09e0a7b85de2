"""What a verifier asks of a node: what has passed, the tensors of it with their receipts, and work done again.

Only the manifest's verifiers are answered. What does not fit one message goes in parts, by offset.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from protocol import wire
from protocol.errors import Reason
from protocol.receipts import Direction, MicrobatchId, SignedReceipt
from protocol.wire import Count, Digest, Natural, PeerName

SAMPLE_ALARM: Final = "sample.alarm"
SAMPLE_LIST: Final = "sample.list"
SAMPLE_SHOW: Final = "sample.show"
REDO: Final = "redo"
REDO_REST: Final = "redo.rest"

ALARM_EVERY: Final = 1.0
"""Seconds between two alarms of one node; what comes twice as often is not heard."""
DRAWN_WITHIN: Final = 12.0
"""Seconds after a microbatch's end at anybody on its way during which a verifier may draw it."""
KEPT_FOR: Final = 16.0
"""Seconds after a microbatch's end for which a node keeps what it was sent of it: until a verifier has heard of it,
drawn it and asked. Not longer: as long as what is kept grows, it goes into memory that was never touched before."""
MAX_LISTED: Final = 256
MAX_WANTED: Final = 32
STATE_BYTES: Final = 8
StateMark = Annotated[bytes, msgspec.Meta(max_length=STATE_BYTES)]
"""The first bytes of a state's digest: which weights some work was done with. Empty: with none."""


class SampleList(wire.Message, frozen=True):
    """Asks what ended at a node after the passage with this serial number."""

    since: Natural


class Passage(wire.Message, frozen=True):
    """One microbatch that ended at a node: whence it came (None at its head), where it went, what was odd about it.

    `version` and `state`: of the weights that the node's work on it was done with; -1 where it came to no work. Said
    before anybody knows what will be looked at, so that a replica whose weights had come to differ from its stage's is
    not taken for a liar, and a liar cannot say so afterwards.
    """

    microbatch: MicrobatchId
    previous: PeerName | None
    next: PeerName | None
    version: Annotated[int, msgspec.Meta(ge=-1, le=2**53)]
    flagged: Direction | None
    state: StateMark


class Listed(wire.Message, frozen=True):
    """The answer, oldest first; `serial` is that of the last one, from which to ask on. `votes`: the digest of the
    node's vote set, so that to compare it takes no question of its own."""

    serial: Natural
    votes: Digest
    passages: Annotated[tuple[Passage, ...], msgspec.Meta(max_length=MAX_LISTED)]


class Wanted(wire.Message, frozen=True):
    """One sequence of a tensor that came to the node, and the receipt that came with it."""

    microbatch: MicrobatchId
    direction: Direction
    sequence: Count


class SampleShow(wire.Message, frozen=True):
    """Asks for all that a verifier wants to see of one node at a time; of the first from `offset` on."""

    wanted: Annotated[tuple[Wanted, ...], msgspec.Meta(min_length=1, max_length=MAX_WANTED)]
    offset: Natural


class Shown(wire.Message, frozen=True):
    """The answer, to as many of the wanted as fit into one message, in order, and at least to the first: its receipt,
    or why it is not shown.

    The payload is their exhibits one after the other, of which only the last may be cut off. An exhibit is the tensor's
    leaves, the sequence, and of an activation all labels.
    """

    answers: Annotated[tuple[SignedReceipt | Reason, ...], msgspec.Meta(min_length=1, max_length=MAX_WANTED)]


class Redo(wire.Message, frozen=True):
    """Asks for one sequence's pass again. The payload is the part from `offset` of `size` bytes of what it is made of.

    For an activation its input, of which a head has none (it draws sequence `sequence` of `slot` itself). For a
    gradient the activation that came forward and the gradient that came back; on the tail the activation and its
    labels. The answer to the part that completes it is `Redone`; to others it is empty.
    """

    number: Natural
    direction: Direction
    version: Natural
    slot: Natural
    sequence: Count
    offset: Natural
    size: Natural


class Redone(wire.Message, frozen=True):
    """`size` bytes of tensor, and of a head's activation its labels, the first of them as payload. They were made with
    the weights of this `state`."""

    size: Natural
    state: StateMark


class RedoRest(wire.Message, frozen=True):
    """Asks for what `Redone` did not hold, from `offset`."""

    number: Natural
    offset: Natural


class Effort(wire.Message, frozen=True):
    """What a verifier has done since it started, on `{run}/effort`: microbatches that passed, and that it looked at;
    alarms that it followed, hearings that it held, bytes that it sent and received over its links."""

    passed: Natural
    sampled: Natural
    alarms: Natural
    hearings: Natural
    bytes: Natural


def effort_topic(run: bytes) -> str:
    return f"{run.hex()}/effort"
