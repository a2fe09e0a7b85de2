"""What tests of votes share: verifiers, peers, and votes of theirs."""

from __future__ import annotations

from typing import Any

from protocol.identity import Identity, PeerId
from protocol.vote_set import VoteSet
from protocol.votes import Cause, Electorate, SignedVote, Verdict, Vote

RUN = b"r" * 32
VERIFIERS = [Identity.generate() for _ in range(3)]
PEERS = [Identity.generate().peer_id for _ in range(4)]
STRANGER = Identity.generate()
TERM = 1000
NOW = 1_000_000
ELECTORATE = Electorate(RUN, frozenset(one.peer_id for one in VERIFIERS), quorum=2, term=TERM)


def make_vote(verifier: Identity = VERIFIERS[0], subject: PeerId = PEERS[0], /, **changes: Any) -> Vote:
    content: dict[str, Any] = {
        "run": RUN, "verifier": verifier.peer_id, "subject": subject, "stage": 1, "verdict": Verdict.BANNED,
        "cause": Cause.EVIDENCE, "text": "its outputs do not follow from its inputs", "evidence": b"e" * 32,
        "samples": 40, "flags": 7, "sequence": 1, "issued": NOW, "expires": NOW + TERM,
    }  # fmt: skip
    return Vote(**{**content, **changes})


def signed_vote(
    verifier: Identity = VERIFIERS[0], subject: PeerId = PEERS[0], /, **changes: Any
) -> SignedVote:
    return SignedVote.sign(make_vote(verifier, subject, **changes), verifier)


def ban(votes: VoteSet, subject: PeerId, verifiers: list[Identity], now: float) -> list[SignedVote]:
    """Have these verifiers vote for a ban in `votes`."""
    return [
        votes.cast(verifier, subject, Verdict.BANNED, Cause.EVIDENCE, now, stage=1, evidence=b"e" * 32)
        for verifier in verifiers
    ]
