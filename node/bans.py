"""What a volunteer that is banned is told."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from protocol.identity import PeerId
from protocol.votes import SignedVote


def explain_ban(peer: PeerId, votes: Mapping[PeerId, SignedVote]) -> str:
    """One line: by whom, for what, until when, and what can be done."""
    if not votes:
        return f"This peer, {peer}, is banned from the run"
    told = [one.vote for one in votes.values()]
    until = datetime.fromtimestamp(min(vote.expires for vote in told), UTC)
    grounds = "; ".join(dict.fromkeys(f"{vote.text} ({vote.cause.value})" for vote in told))
    return (
        f"This peer, {peer}, is banned from the run by {len(told)} verifiers ({', '.join(sorted(votes))}): {grounds}. "
        f"The ban holds until {until:%Y-%m-%d %H:%M} UTC unless it is repeated. If you did not tamper with this node, "
        "look for faulty memory, an overclocked GPU or a changed installation, and show the operator the votes: "
        "sentinel-node bans INVITE --export FILE"
    )
