"""A run's bans as a file for people, with the signed votes in it, so that it can be checked with the manifest alone."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Annotated, Final, Literal

import msgspec

from protocol import wire
from protocol.errors import ProtocolError, UserError
from protocol.identity import PeerId
from protocol.vote_set import VoteSet
from protocol.votes import (
    Contradiction,
    Electorate,
    SignedVote,
    Statement,
    Verdict,
    check_current,
    read_vote,
)

FORMAT: Final = "sentinel-bans/1"
MAX_FILE: Final = 64 * 1024 * 1024
_EXPORT = "Do not use this list; make one yourself: sentinel-node bans INVITE --export FILE"


class VoteRow(msgspec.Struct, frozen=True):
    """A vote in words, and `signed`: the same in base64, as its verifier signed it. Times are Unix seconds."""

    verifier: str
    verdict: str
    cause: str
    text: str
    stage: int
    samples: int
    flags: int
    sequence: int
    issued: int
    expires: int
    evidence: str
    signed: str

    @classmethod
    def of(cls, signed: SignedVote) -> VoteRow:
        vote = signed.vote
        return cls(
            verifier=vote.verifier,
            verdict=vote.verdict.value,
            cause=vote.cause.value,
            text=vote.text,
            stage=vote.stage,
            samples=vote.samples,
            flags=vote.flags,
            sequence=vote.sequence,
            issued=vote.issued,
            expires=vote.expires,
            evidence=vote.evidence.hex(),
            signed=b64encode(wire.encode(signed)).decode(),
        )

    def statement(self) -> SignedVote:
        """The signed vote. Raises `ProtocolError` or `ValueError` if there is none; what it says is not checked."""
        return read_vote(b64decode(self.signed, validate=True))


class BanRow(msgspec.Struct, frozen=True):
    """`since`: when the quorum was reached; `until`: when it ends, if nobody votes again."""

    peer: str
    stage: int
    since: int
    until: int
    votes: tuple[VoteRow, ...]


class DisputeRow(msgspec.Struct, frozen=True):
    """A peer that is not banned, of whom some verifier thinks ill; `verdict` is the quorum's."""

    peer: str
    verdict: str
    votes: tuple[VoteRow, ...]


class ContradictionRow(msgspec.Struct, frozen=True):
    """A verifier whose votes do not count, and the two statements of it that contradict each other."""

    verifier: str
    statements: tuple[VoteRow, VoteRow]


class BanList(msgspec.Struct, frozen=True):
    """As of `as_of` (Unix seconds). `bans` are the quorum's; the rest shows who disagrees and who lied."""

    format: Literal["sentinel-bans/1"]
    run: str
    as_of: Annotated[int, msgspec.Meta(ge=0, le=10**11)]
    quorum: int
    verifiers: tuple[str, ...]
    bans: tuple[BanRow, ...]
    disputed: tuple[DisputeRow, ...]
    contradictions: tuple[ContradictionRow, ...]


def list_bans(votes: VoteSet, now: float) -> BanList:
    electorate = votes.electorate
    bans = votes.bans(now)
    disputed = {
        peer: tuple(votes.votes_on(peer, now).values())
        for peer in sorted(votes.subjects())
        if peer not in bans
    }
    return BanList(
        format=FORMAT,
        run=electorate.run.hex(),
        as_of=int(now),
        quorum=electorate.quorum,
        verifiers=tuple(sorted(electorate.verifiers)),
        bans=tuple(_ban_row(peer, tuple(cast.values()), electorate.quorum) for peer, cast in bans.items()),
        disputed=tuple(
            DisputeRow(peer, votes.verdict_of(peer, now).value, tuple(map(VoteRow.of, cast)))
            for peer, cast in disputed.items()
            if any(signed.vote.verdict is not Verdict.OK for signed in cast)
        ),
        contradictions=tuple(
            ContradictionRow(verifier, (VoteRow.of(proof.first), VoteRow.of(proof.second)))
            for verifier, proof in sorted(votes.contradictions.items())
        ),
    )


def _ban_row(peer: PeerId, cast: tuple[SignedVote, ...], quorum: int) -> BanRow:
    cast = tuple(sorted(cast, key=lambda signed: signed.vote.verifier))
    issued = sorted(signed.vote.issued for signed in cast)
    expires = sorted((signed.vote.expires for signed in cast), reverse=True)
    return BanRow(
        peer=peer,
        stage=cast[0].vote.stage,
        since=issued[quorum - 1],
        until=expires[quorum - 1],
        votes=tuple(map(VoteRow.of, cast)),
    )


def parse(data: bytes, source: str) -> BanList:
    """The list in a file, by form alone. Raises `UserError`."""
    if len(data) > MAX_FILE:
        raise UserError(f"{source} is over {MAX_FILE >> 20} MiB, so no list of bans", _EXPORT)
    try:
        return msgspec.json.decode(data, type=BanList)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{source} is no list of bans ({str(error)[:120]})", _EXPORT) from None


def check(found: BanList, electorate: Electorate) -> VoteSet:
    """Whether every ban held when the list was made, by signatures and quorum. Raises `UserError` that says which not.

    The checks, in order: run; for each statement: form, that the words beside it are its words, those of a vote on
    arrival; the contradictions; for each ban: that a quorum of distinct verifiers that count votes for it. A list can
    leave out what speaks for a peer: later votes are not in it.
    """
    if found.run != electorate.run.hex():
        raise UserError("The list is of another run than the manifest", "Give the manifest of the list's run")
    held = VoteSet(electorate)
    for lie in found.contradictions:
        first, second = (_statement(row, row.verifier) for row in lie.statements)
        _take(held, Contradiction(first, second), found.as_of, f"contradiction of {lie.verifier}")
    for ban in found.bans:
        for row in ban.votes:
            signed = _statement(row, ban.peer)
            if signed.vote.subject != ban.peer:
                raise _does_not_hold(ban.peer, f"the vote of {row.verifier} is on another peer")
            _take(held, signed, found.as_of, f"ban of {ban.peer}")
    for ban in found.bans:
        cast = held.bans(found.as_of).get(PeerId(ban.peer))
        if cast is None:
            count = sum(
                signed.vote.verdict is Verdict.BANNED
                for signed in held.votes_on(PeerId(ban.peer), found.as_of).values()
            )
            raise _does_not_hold(ban.peer, f"{count} of the {electorate.quorum} votes that it takes")
        if ban != _ban_row(PeerId(ban.peer), tuple(cast.values()), electorate.quorum):
            raise _does_not_hold(ban.peer, "its stage, times or votes are not those of the signed votes")
    return held


def _statement(row: VoteRow, about: str) -> SignedVote:
    try:
        signed = row.statement()
    except (ProtocolError, ValueError):
        raise _does_not_hold(about, f"the signed vote of {row.verifier:.60} is damaged") from None
    if VoteRow.of(signed) != row:
        raise _does_not_hold(about, f"the words beside the vote of {row.verifier:.60} are not what it signed")
    return signed


def _take(held: VoteSet, statement: Statement, as_of: float, what: str) -> None:
    try:
        held.take(statement, as_of)
        if isinstance(statement, SignedVote):
            check_current(statement.vote, as_of)
    except ProtocolError as error:
        raise UserError(f"The {what} does not hold: {error}", _EXPORT) from None


def _does_not_hold(peer: str, problem: str) -> UserError:
    return UserError(f"The ban of {peer:.60} does not hold: {problem}", _EXPORT)
