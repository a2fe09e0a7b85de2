"""Votes: what one verifier swears about one peer, and two statements of it that cannot both be true.

A vote alone does nothing. What a set of them amounts to is in `protocol.vote_set`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from protocol import wire
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId, check_signature
from protocol.wire import Digest, Natural, PeerName, Signature, StageField

DOMAIN = b"sentinel/vote/1"
MAX_VOTE: Final = 1536
"""Bytes of a signed vote."""
MAX_TEXT: Final = 200
CLOCK_SLACK: Final = 30
"""Seconds by which a vote may seem to come from the future."""


class Verdict(StrEnum):
    """What a peer is held to be. They climb in this order; each includes the ones before it."""

    OK = "ok"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"
    BANNED = "banned"

    @property
    def rank(self) -> int:
        return _RANKS[self]

    def includes(self, other: Verdict) -> bool:
        """Whether who votes for this verdict votes for `other` too."""
        return self.rank >= other.rank


_RANKS: Final = {verdict: rank for rank, verdict in enumerate(Verdict)}


class Cause(StrEnum):
    """What a vote rests on."""

    EVIDENCE = "evidence"
    """The sequential test over the peer's streams."""
    RECOMPUTED = "recomputed"
    """Others that did its work again got something else."""
    RECEIPTS = "receipts"
    """Its own signed receipts cannot all be true."""
    WITHHELD = "withheld"
    """It refuses or stalls the samples that it is asked for."""
    CLEARED = "cleared"
    """It has behaved: an earlier vote is taken back."""


class Vote(wire.Message, frozen=True):
    """What `verifier` holds `subject` to be, from `issued` until `expires` (Unix time in seconds).

    `sequence` rises with every statement of this verifier about this subject, and a later one takes the place of the
    earlier. `evidence` is the digest of what the verifier keeps to show for it; `samples` and `flags` count the
    subject's hops that it judged and found odd. `text` is for people.
    """

    run: Digest
    verifier: PeerName
    subject: PeerName
    stage: StageField
    verdict: Verdict
    cause: Cause
    text: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    evidence: Digest
    samples: Natural
    flags: Natural
    sequence: Natural
    issued: Natural
    expires: Natural


class SignedVote(wire.Message, frozen=True):
    vote: Vote
    signature: Signature

    @classmethod
    def sign(cls, vote: Vote, identity: Identity) -> SignedVote:
        return cls(vote, identity.sign(DOMAIN, wire.encode(vote)))

    def check_signed(self) -> None:
        """Raises `ProtocolError` (bad_signature) unless its verifier signed it."""
        check_signature(self.vote.verifier, DOMAIN, wire.encode(self.vote), self.signature)


@dataclass(frozen=True)
class Electorate:
    """Who may vote in a run, how many of them it takes, and for how many seconds a vote holds at most."""

    run: bytes
    verifiers: frozenset[PeerId]
    quorum: int
    term: int

    def __post_init__(self) -> None:
        assert self.quorum >= 1  # With none everybody would be banned.

    @property
    def is_empty(self) -> bool:
        return not self.verifiers


def read_vote(data: bytes) -> SignedVote:
    """A signed vote, by form alone. In order: size (oversized), form (malformed). Raises `ProtocolError`."""
    if len(data) > MAX_VOTE:
        raise ProtocolError(Reason.OVERSIZED, "vote")
    return wire.decode(SignedVote, data)


def check_statement(signed: SignedVote, electorate: Electorate) -> None:
    """Whether a verifier of this run made this statement, whenever that was. Raises `ProtocolError`.

    The checks, in order: run, verifier, subject (a verifier is not voted on), text, term, signature. No honest peer
    passes on what fails one of them.
    """
    vote = signed.vote
    if vote.run != electorate.run:
        raise ProtocolError(Reason.FOREIGN_RUN)
    if vote.verifier not in electorate.verifiers:
        raise ProtocolError(Reason.WRONG_PEER, f"{vote.verifier} is no verifier of this run")
    if vote.subject in electorate.verifiers:
        raise ProtocolError(Reason.WRONG_PEER, f"a vote on the verifier {vote.subject}")
    if not vote.text.isprintable():  # It is shown on terminals.
        raise ProtocolError(Reason.MALFORMED, "text with control characters")
    if not vote.issued < vote.expires <= vote.issued + electorate.term:
        raise ProtocolError(Reason.MALFORMED, f"a term of {vote.expires - vote.issued} s")
    signed.check_signed()


def check_current(vote: Vote, now: float) -> None:
    """In order: expired, too_early (issued more than `CLOCK_SLACK` after `now`). Raises `ProtocolError`."""
    if vote.expires <= now:
        raise ProtocolError(Reason.EXPIRED, f"vote of {vote.verifier}")
    if vote.issued > now + CLOCK_SLACK:
        raise ProtocolError(Reason.TOO_EARLY, f"vote issued {vote.issued - now:.0f} s from now")


def contradicts(one: Vote, other: Vote) -> bool:
    """Whether no honest verifier makes both statements.

    Two different ones with one sequence number, or two of which the later in sequence was issued, or expires, sooner:
    with those a verifier could show some peers a ban that others have seen it take back.
    """
    if one == other or (one.run, one.verifier, one.subject) != (other.run, other.verifier, other.subject):
        return False
    earlier, later = sorted((one, other), key=lambda vote: vote.sequence)
    if earlier.sequence == later.sequence:
        return True
    return later.issued < earlier.issued or later.expires < earlier.expires


class Contradiction(wire.Message, frozen=True):
    """Two statements of one verifier that contradict each other: the evidence for which its votes stop counting."""

    first: SignedVote
    second: SignedVote

    @property
    def verifier(self) -> PeerId:
        return PeerId(self.first.vote.verifier)


def check_contradiction(evidence: Contradiction, electorate: Electorate) -> None:
    """In order: do they contradict each other (malformed); each is a verifier's statement. Raises `ProtocolError`.

    When they were made does not matter: a contradiction does not expire.
    """
    if not contradicts(evidence.first.vote, evidence.second.vote):
        raise ProtocolError(Reason.MALFORMED, "no contradiction")
    for signed in (evidence.first, evidence.second):
        check_statement(signed, electorate)


Statement = SignedVote | Contradiction
"""What is told of votes, and checked on arrival."""
MAX_BUNDLE: Final = 512
MAX_CONTRADICTIONS: Final = 64


class VoteBundle(wire.Message, frozen=True):
    """Statements on their way: news by gossip, or a page of a set. The last page has less than `MAX_BUNDLE` votes."""

    votes: Annotated[tuple[SignedVote, ...], msgspec.Meta(max_length=MAX_BUNDLE)] = ()
    contradictions: Annotated[tuple[Contradiction, ...], msgspec.Meta(max_length=MAX_CONTRADICTIONS)] = ()


def votes_topic(run: bytes) -> str:
    return f"{run.hex()}/votes"
