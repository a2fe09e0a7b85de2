"""A vote set on disk, so that a peer that starts again knows its bans before anybody has answered it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import structlog

from protocol import wire
from protocol.errors import ProtocolError
from protocol.vote_set import VoteSet
from protocol.votes import Contradiction, SignedVote, Statement

log = structlog.get_logger("votes")

MAX_FILE: Final = 256 * 1024 * 1024


class VoteArchive(wire.Message, frozen=True):
    """The file. Unlike what comes in a message it is bounded by its size alone."""

    votes: tuple[SignedVote, ...]
    contradictions: tuple[Contradiction, ...]


def archive(votes: VoteSet) -> bytes:
    return wire.encode(VoteArchive(tuple(votes.votes()), tuple(votes.contradictions.values())))


def write(content: bytes, path: Path) -> None:
    """Replace the file in one go. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(votes: VoteSet, path: Path, now: float) -> None:
    """Add what the file holds to `votes`, every statement checked as if a stranger had sent it.

    A file that is damaged or of another run costs only what others will tell again; it is logged and replaced.
    """
    try:
        content = path.read_bytes() if path.exists() and path.stat().st_size <= MAX_FILE else b""
        saved = wire.decode(VoteArchive, content) if content else VoteArchive((), ())
    except (OSError, ProtocolError) as error:
        log.warning("the file of votes cannot be read, and is made anew", file=str(path), problem=str(error))
        return
    refused = 0
    statements: tuple[Statement, ...] = (*saved.contradictions, *saved.votes)
    for statement in statements:
        try:
            votes.take(statement, now)
        except ProtocolError:
            refused += 1
    if refused:  # Most of them: expired while we were away.
        log.info(
            "votes of the file that do not hold any more", refused=refused, held=len(saved.votes) - refused
        )
