"""What a volunteer that is banned is told."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from protocol import wire
from protocol.errors import ProtocolError
from protocol.identity import PeerId
from protocol.vote_file import VoteArchive
from protocol.votes import SignedVote, Verdict


def explain_ban(peer: PeerId, votes: Sequence[SignedVote], quorum: int = 1) -> str:
    """One line: by whom, for what, until when, and what can be done.

    The ban ends once fewer than `quorum` of the votes are in force.
    """
    if not votes:
        return (
            f"This peer, {peer}, is banned from the run. By whom and for what says, under any other identity: "
            "sentinel-node bans INVITE"
        )
    told = [one.vote for one in votes]
    expires = sorted((vote.expires for vote in told), reverse=True)
    until = datetime.fromtimestamp(expires[min(quorum, len(expires)) - 1], UTC)
    grounds = "; ".join(dict.fromkeys(f"{vote.text} ({vote.cause.value})" for vote in told))
    names = ", ".join(sorted(vote.verifier for vote in told))
    return (
        f"This peer, {peer}, is banned from the run by {len(told)} verifiers ({names}): {grounds}. "
        f"The ban holds until {until:%Y-%m-%d %H:%M} UTC unless it is repeated. If you did not tamper with this node, "
        "look for faulty memory, an overclocked GPU or a changed installation, and show the operator the votes: "
        "sentinel-node bans INVITE --export FILE"
    )


def remembered_ban(path: Path, peer: PeerId) -> list[SignedVote]:
    """The votes against `peer` that it kept at `path` when it was still talked to, for its owner to read."""
    try:
        held = wire.decode(VoteArchive, path.read_bytes()).votes
    except (OSError, ProtocolError):
        return []
    latest = {one.vote.verifier: one for one in held if one.vote.subject == peer}  # In order of sequence.
    return [one for one in latest.values() if one.vote.verdict is Verdict.BANNED]
