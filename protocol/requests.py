"""The questions peers ask each other over a link: method names, and the types of their bodies."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from protocol import wire
from protocol.wire import Count, Digest, Natural, PeerName

MANIFEST: Final = "manifest"
ROUND_OPEN: Final = "round.open"
ROUND_COMMIT: Final = "round.commit"
ROUND_PART: Final = "round.part"
STATE_DESCRIBE: Final = "state.describe"
STATE_CHUNK: Final = "state.chunk"
VOTES: Final = "votes"

MAX_ROSTER: Final = 256
MAX_SETTLED: Final = 8192


class Nothing(wire.Message, frozen=True):
    """The body where there is nothing to say."""


class RoundOpen(wire.Message, frozen=True):
    """A leader asks a replica to stop accumulating for round `version` and say how much it has."""

    version: Natural
    attempt: Count


class RoundHolding(wire.Message, frozen=True):
    """The answer: gradients of so many microbatches, these slots."""

    count: Count
    slots: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=MAX_SETTLED)]


class Member(wire.Message, frozen=True):
    peer: PeerName
    count: Count


class RoundCommit(wire.Message, frozen=True):
    """Average now, among these, weighted by their counts. The roster's order is the order of summation."""

    version: Natural
    attempt: Count
    roster: Annotated[tuple[Member, ...], msgspec.Meta(min_length=1, max_length=MAX_ROSTER)]
    settled: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=MAX_SETTLED)]


class RoundPart(wire.Message, frozen=True):
    """The sender's gradient sum over floats `start` up to `stop`, as fp32 payload. Answer: the mean of all."""

    version: Natural
    attempt: Count
    start: Natural
    stop: Natural


class StateDescription(wire.Message, frozen=True):
    """Which state a replica can give. The payload that comes with it: the digests of its chunks, 32 bytes each."""

    version: Natural
    digest: Digest
    chunk_bytes: Count
    averaged: Natural
    settled: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=MAX_SETTLED)]


class StateChunk(wire.Message, frozen=True):
    """Asks for one chunk of the state at `version`; it is the payload of the answer."""

    version: Natural
    index: Count


class VotesWanted(wire.Message, frozen=True):
    """Asks for the votes after this key, in the order of (verifier, subject, sequence); from ("", "", 0) for all.

    `known`: the digest of the asker's own set. Where all is asked for and the sets are equal, no votes are sent.
    """

    known: Digest
    verifier: Annotated[str, msgspec.Meta(max_length=52)]
    subject: Annotated[str, msgspec.Meta(max_length=52)]
    sequence: Natural


class VotesHeld(wire.Message, frozen=True):
    """The answer: the digest of the whole set. The payload is a `VoteBundle`, or nothing where the sets are equal."""

    digest: Digest
