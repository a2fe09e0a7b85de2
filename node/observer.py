"""A peer that serves nothing: reads directory, metrics and votes, for `peers`, the demo and the benchmarks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time

from node.progress import LIVE_FOR
from protocol import wire
from protocol.ballots import Ballots
from protocol.directory import Directory, StageRecord
from protocol.errors import ProtocolError
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import Deaf, fetch_manifest
from protocol.invite import Invite
from protocol.links import Switchboard
from protocol.manifest import SignedManifest
from protocol.reports import Metrics, metrics_topic
from protocol.reputation import ReputationBook, reputation_topic
from protocol.samples import Effort, effort_topic
from protocol.vote_set import VoteSet
from protocol.votes import Verdict

_MAX_PEERS = 4096
_ASKED = 8
_LATE_ROUNDS = 4
"""Rounds after which a slot that has not come back will not come any more."""


@dataclass
class Sighting:
    """A peer's last figures, and when they came (monotonic seconds)."""

    metrics: Metrics
    at: float


@dataclass
class Observer:
    """`start`, read, `stop` on every path. `on_metrics` is called for each report."""

    invite: Invite
    identity: Path
    listen: tuple[str, ...] = DEFAULT_LISTEN
    on_metrics: Callable[[PeerId, Metrics], None] | None = None
    on_verdict: Callable[[PeerId, Verdict], None] | None = None
    sightings: dict[PeerId, Sighting] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    efforts: dict[PeerId, Effort] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> SignedManifest:
        Identity.load_or_create(self.identity)
        self.host = await Host.start(self.identity, listen=self.listen, seeds=self.invite.seeds)
        self.signed = await fetch_manifest(self.host, self.invite)
        stages = self.signed.manifest.stages.count
        self._directory = await Directory.join(self.host, self.signed.run, stages)
        await self.host.subscribe(metrics_topic(self.signed.run), self._hear)
        await self.host.subscribe(effort_topic(self.signed.run), self._hear_effort)
        self.reputation = ReputationBook(self.signed.electorate)
        await self.host.subscribe(reputation_topic(self.signed.run), self._hear_reputation)
        await self._follow_votes()
        return self.signed

    async def _follow_votes(self) -> None:
        self.votes = VoteSet(self.signed.electorate)
        self.votes.subscribe(self._on_verdict)
        self._switchboard = Switchboard(self.host, self.signed.run, stage=-1, owner=Deaf())
        await self._switchboard.start(accept=False)
        self._ballots = Ballots(self._switchboard, self.votes, seeds=self.invite.seeds)
        await self._ballots.start()
        await self._ballots.catch_up()
        self._comparing = asyncio.create_task(self._ballots.run())

    def _on_verdict(self, peer: PeerId, before: Verdict, after: Verdict) -> None:
        if self.on_verdict is not None:
            self.on_verdict(peer, after)
        self.news.set()

    def _hear_reputation(self, author: PeerId, data: bytes) -> None:
        with suppress(ProtocolError):
            self.reputation.hear(data, time())

    def _hear_effort(self, author: PeerId, data: bytes) -> None:
        with suppress(ProtocolError):
            if author in self.signed.electorate.verifiers:
                self.efforts[author] = wire.decode(Effort, data)

    def _hear(self, author: PeerId, data: bytes) -> None:
        try:
            metrics = wire.decode(Metrics, data)
        except ProtocolError:
            return
        if author not in self.sightings and len(self.sightings) >= _MAX_PEERS:
            return
        self.sightings[author] = Sighting(metrics, monotonic())
        if metrics.stage == self.signed.manifest.stages.count - 1:
            # The first word about a slot counts: a later attempt of it is the same text again.
            for one in metrics.losses:
                self.losses.setdefault(one.slot, one.loss)
        if self.on_metrics is not None:
            self.on_metrics(author, metrics)
        self.news.set()

    async def wait_for_news(self, *, timeout: float) -> None:
        """Until the next report, or `timeout` seconds."""
        self.news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.news.wait()

    async def records(self) -> list[StageRecord]:
        """Every peer's record in the DHT, by stage."""
        stages = range(self.signed.manifest.stages.count)
        found = await asyncio.gather(*(self._directory.peers(stage) for stage in stages))
        return [record for records in found for record in records.values()]

    async def meet(self) -> None:
        """Connect to the peers of the directory, so that their gossip reaches us without the seed."""
        for record in await self.records():
            try:
                await self.host.connect(PeerId(record.peer), record.addresses)
            except ProtocolError:
                continue

    async def gather_votes(self) -> int:
        """Ask the seeds and some peers of the directory for their votes; how many of them answered."""
        records = (await self.records())[:_ASKED]
        return await self._ballots.catch_up((PeerId(one.peer), one.addresses) for one in records)

    def shunned_by(self, peer: PeerId) -> list[PeerId]:
        """Who says of late that what it sent to `peer` did not come back."""
        return sorted(
            sender
            for sender, one in self.sightings.items()
            if peer in one.metrics.shunned and self.seconds_since(one) < LIVE_FOR
        )

    def seconds_since(self, sighting: Sighting) -> float:
        return monotonic() - sighting.at

    def round_loss(self, round_: int) -> float | None:
        """Mean loss of a round's slots in nats a token; None until all of them are known, or no more will be: every
        tail that is still heard of has closed the rounds in which the others could have come."""
        manifest = self.signed.manifest
        size, rounds = manifest.batch.microbatches, manifest.schedule.rounds
        known = [self.losses.get(slot) for slot in range(round_ * size, (round_ + 1) * size)]
        values = [loss for loss in known if loss is not None]
        last = manifest.stages.count - 1
        tails = [
            one.metrics.version
            for one in self.sightings.values()
            if one.metrics.stage == last and self.seconds_since(one) < LIVE_FOR
        ]
        is_long_over = min(tails, default=0) >= min(round_ + _LATE_ROUNDS, rounds)
        return sum(values) / len(values) if len(values) == size or (values and is_long_over) else None

    async def stop(self) -> None:
        if hasattr(self, "_comparing"):
            self._comparing.cancel()
            await asyncio.gather(self._comparing, return_exceptions=True)
        if hasattr(self, "_ballots"):
            await self._ballots.stop()
            await self._switchboard.stop()
        if hasattr(self, "host"):
            await self.host.stop()
