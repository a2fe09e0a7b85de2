"""What a verifier says of the peers: votes when its opinion has changed, reputation for people, its own effort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic, time

import structlog

from protocol import wire
from protocol.ballots import Ballots
from protocol.host import Host
from protocol.identity import Identity, PeerId
from protocol.reputation import MAX_ACCOUNTS, Account, Reputation, SignedReputation, reputation_topic
from protocol.votes import Electorate, Verdict
from verifier.bench import Opinion
from verifier.streams import Direction, StageIndex

log = structlog.get_logger("verifier")

CALM = 10.0
"""Seconds that a verdict stands at least before it is voted down."""


@dataclass(frozen=True)
class Known:
    """What is known of a node besides its work. `throughput` in tokens per second, as it says itself; `uptime` in s."""

    stage: StageIndex
    throughput: float
    uptime: float


@dataclass(frozen=True)
class _Cast:
    """What we last swore of a peer: when (monotonic seconds), and until when it holds (Unix time)."""

    verdict: Verdict
    at: float
    expires: int


class Spokesman:
    """Of one verifier, in its name."""

    def __init__(self, identity: Identity, electorate: Electorate, host: Host, ballots: Ballots) -> None:
        self._identity, self._electorate = identity, electorate
        self._host, self._ballots = host, ballots
        self._casts: dict[PeerId, _Cast] = {}

    def remember(self) -> None:
        """What we swore before we were started again still stands."""
        votes = self._ballots.votes
        for subject in votes.subjects():
            own = votes.votes_on(subject, time()).get(self._identity.peer_id)
            if own is not None:
                self._casts[subject] = _Cast(own.vote.verdict, monotonic(), own.vote.expires)

    def accused(self) -> set[PeerId]:
        """Whom we suspect ourselves, or another verifier holds something against, and of whom we are not done."""
        votes = self._ballots.votes
        found = set()
        for peer in votes.subjects():
            held = votes.votes_on(peer, time()).values()
            if any(one.vote.verdict is not Verdict.OK for one in held) and not votes.is_banned(peer):
                found.add(peer)
        return {peer for peer in found if self._said(peer) is not Verdict.BANNED}

    def _said(self, peer: PeerId) -> Verdict:
        last = self._casts.get(peer)
        return last.verdict if last is not None else Verdict.OK

    @property
    def sworn(self) -> set[PeerId]:
        """Of whom we have sworn something."""
        return set(self._casts)

    async def review(self, opinions: Mapping[PeerId, Opinion], known: Mapping[PeerId, Known]) -> None:
        """Vote on those of whom we think otherwise than we said, or of whom what we said expires."""
        for peer, opinion in opinions.items():
            if self._is_due(peer, opinion):
                await self._cast(peer, opinion, known)

    def _is_due(self, peer: PeerId, opinion: Opinion) -> bool:
        last, said = self._casts.get(peer), self._said(peer)
        if said is Verdict.BANNED and opinion.verdict is not Verdict.BANNED:
            return False  # We were started again, and do not know any more why; it holds until it expires.
        if opinion.verdict is said:
            return (
                last is not None
                and said is not Verdict.OK
                and last.expires - time() < self._electorate.term / 2
            )
        has_fallen = opinion.verdict.rank < said.rank
        return not has_fallen or last is None or monotonic() - last.at >= CALM

    async def _cast(self, peer: PeerId, opinion: Opinion, known: Mapping[PeerId, Known]) -> None:
        signed = self._ballots.votes.cast(
            self._identity,
            peer,
            opinion.verdict,
            opinion.cause,
            time(),
            stage=known[peer].stage if peer in known else 0,
            evidence=opinion.evidence,
            samples=opinion.samples,
            flags=sum(opinion.flags.values()),
            text=opinion.text,
        )
        self._casts[peer] = _Cast(opinion.verdict, monotonic(), signed.vote.expires)
        log.info("voted", subject=peer, verdict=opinion.verdict.value, text=opinion.text)
        await self._ballots.publish(signed)

    async def report(self, opinions: Mapping[PeerId, Opinion], known: Mapping[PeerId, Known]) -> None:
        """Our account of every node, signed, for everyone."""
        accounts = [_account(peer, opinions[peer], one) for peer, one in sorted(known.items())]
        for at in range(0, len(accounts), MAX_ACCOUNTS):
            some = tuple(accounts[at : at + MAX_ACCOUNTS])
            report = Reputation(self._electorate.run, self._identity.peer_id, int(time()), some)
            signed = SignedReputation.sign(report, self._identity)
            await self._host.publish(reputation_topic(self._electorate.run), wire.encode(signed))


def _account(peer: PeerId, opinion: Opinion, known: Known) -> Account:
    return Account(
        peer=peer,
        stage=known.stage,
        verdict=opinion.verdict,
        samples=opinion.samples,
        activation_flags=opinion.flags.get(Direction.ACTIVATION, 0),
        gradient_flags=opinion.flags.get(Direction.GRADIENT, 0),
        log_evidence=opinion.log_evidence,
        throughput=known.throughput,
        uptime=known.uptime,
        words=opinion.words,
    )
