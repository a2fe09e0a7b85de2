"""Reputation: what each verifier has seen of each peer, reported and signed; readers take the median across verifiers.

It is for people. What follows for a peer is decided by votes alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, median_low
from typing import Annotated, Final

import msgspec

from protocol import wire
from protocol.errors import ProtocolError, Reason
from protocol.gossip import MAX_GOSSIP
from protocol.identity import Identity, PeerId, check_signature
from protocol.vote_set import MAX_SUBJECTS
from protocol.votes import CLOCK_SLACK, MAX_TEXT, Electorate, Verdict
from protocol.wire import Digest, Natural, PeerName, Signature, StageField

DOMAIN = b"sentinel/reputation/1"
LIFETIME: Final = 60
"""Seconds for which a report is believed; verifiers repeat theirs sooner."""
MAX_ACCOUNTS: Final = 128
MAX_WORDS: Final = 2
_Score = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_Rate = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Account(wire.Message, frozen=True):
    """What one verifier has seen of one peer since it knows it.

    `samples`: its hops that were judged, and how many were found odd by direction; `log_evidence` in nats; `throughput`
    in tokens per second; `uptime` in seconds; `words`: the latest grounds, for people.
    """

    peer: PeerName
    stage: StageField
    verdict: Verdict
    samples: Natural
    activation_flags: Natural
    gradient_flags: Natural
    log_evidence: _Score
    throughput: _Rate
    uptime: _Rate
    words: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=MAX_WORDS)]


class Reputation(wire.Message, frozen=True):
    """A verifier's accounts of up to `MAX_ACCOUNTS` peers, as of `issued` (Unix time in seconds).

    Who has more accounts makes several reports: each account stands for itself.
    """

    run: Digest
    verifier: PeerName
    issued: Natural
    accounts: Annotated[tuple[Account, ...], msgspec.Meta(max_length=MAX_ACCOUNTS)]


class SignedReputation(wire.Message, frozen=True):
    reputation: Reputation
    signature: Signature

    @classmethod
    def sign(cls, reputation: Reputation, identity: Identity) -> SignedReputation:
        return cls(reputation, identity.sign(DOMAIN, wire.encode(reputation)))


def read_reputation(data: bytes, electorate: Electorate, now: float) -> Reputation:
    """Check a report. In order, each IGNORE: size, form, run, verifier, age, words, signature.

    Raises `ProtocolError`.
    """
    if len(data) > MAX_GOSSIP:
        raise ProtocolError(Reason.OVERSIZED, "reputation")
    signed = wire.decode(SignedReputation, data)
    report = signed.reputation
    if report.run != electorate.run:
        raise ProtocolError(Reason.FOREIGN_RUN)
    if report.verifier not in electorate.verifiers:
        raise ProtocolError(Reason.WRONG_PEER, f"{report.verifier} is no verifier of this run")
    if report.issued < now - LIFETIME:
        raise ProtocolError(Reason.EXPIRED, f"reputation of {now - report.issued:.0f} s ago")
    if report.issued > now + CLOCK_SLACK:
        raise ProtocolError(Reason.TOO_EARLY, f"reputation from {report.issued - now:.0f} s ahead")
    if not all(words.isprintable() for account in report.accounts for words in account.words):
        raise ProtocolError(Reason.MALFORMED, "words with control characters")
    check_signature(report.verifier, DOMAIN, wire.encode(report), signed.signature)
    return report


@dataclass(frozen=True)
class Standing:
    """A peer as the median verifier sees it; `verifiers` of them have an account of it."""

    peer: PeerId
    stage: int
    verdict: Verdict
    verifiers: int
    samples: float
    activation_flags: float
    gradient_flags: float
    log_evidence: float
    throughput: float
    uptime: float


class ReputationBook:
    """The latest account of each verifier on each peer. Bounded: `MAX_SUBJECTS` a verifier."""

    def __init__(self, electorate: Electorate) -> None:
        self._electorate = electorate
        self._held: dict[PeerId, dict[PeerId, tuple[int, Account]]] = {}

    def hear(self, data: bytes, now: float) -> Reputation:
        """Take a report; an account that is older than the one held is left. Raises `ProtocolError`."""
        report = read_reputation(data, self._electorate, now)
        held = self._held.setdefault(PeerId(report.verifier), {})
        for account in report.accounts:
            peer = PeerId(account.peer)
            issued, _ = held.get(peer, (-1, account))
            if report.issued > issued and (peer in held or len(held) < MAX_SUBJECTS):
                held[peer] = (report.issued, account)
        return report

    def advance(self, now: float) -> None:
        """Forget what was not repeated for `LIFETIME` seconds."""
        for verifier, held in self._held.items():
            self._held[verifier] = {peer: entry for peer, entry in held.items() if entry[0] >= now - LIFETIME}

    def accounts_of(self, peer: PeerId) -> dict[PeerId, Account]:
        """What each verifier says of this peer."""
        return {verifier: held[peer][1] for verifier, held in self._held.items() if peer in held}

    def standings(self, excluded: Iterable[PeerId] = ()) -> dict[PeerId, Standing]:
        """By peer; without the accounts of the verifiers `excluded` (those that contradicted themselves)."""
        heard = [held for verifier, held in self._held.items() if verifier not in set(excluded)]
        return table(account for held in heard for _, account in held.values())


def table(accounts: Iterable[Account]) -> dict[PeerId, Standing]:
    """The median of each figure over the accounts of a peer, of which each verifier has given one."""
    by_peer: dict[PeerId, list[Account]] = {}
    for account in accounts:
        by_peer.setdefault(PeerId(account.peer), []).append(account)
    return {peer: _median(peer, given) for peer, given in sorted(by_peer.items())}


def _median(peer: PeerId, accounts: list[Account]) -> Standing:
    ranked = sorted((account.verdict for account in accounts), key=lambda verdict: verdict.rank)
    return Standing(
        peer=peer,
        stage=median_low(account.stage for account in accounts),
        verdict=ranked[(len(ranked) - 1) // 2],  # Of two the milder: the other is a minority of one.
        verifiers=len(accounts),
        samples=median(account.samples for account in accounts),
        activation_flags=median(account.activation_flags for account in accounts),
        gradient_flags=median(account.gradient_flags for account in accounts),
        log_evidence=median(account.log_evidence for account in accounts),
        throughput=median(account.throughput for account in accounts),
        uptime=median(account.uptime for account in accounts),
    )


def reputation_topic(run: bytes) -> str:
    return f"{run.hex()}/reputation"
