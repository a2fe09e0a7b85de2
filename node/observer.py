"""A peer that serves nothing: reads the directory and the metrics, for `peers`, the demo and the benchmarks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from protocol import wire
from protocol.directory import Directory, StageRecord
from protocol.errors import ProtocolError
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import fetch_manifest
from protocol.invite import Invite
from protocol.manifest import SignedManifest
from protocol.reports import Metrics, metrics_topic

_MAX_PEERS = 4096


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
    sightings: dict[PeerId, Sighting] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> SignedManifest:
        Identity.load_or_create(self.identity)
        self.host = await Host.start(self.identity, listen=self.listen, seeds=self.invite.seeds)
        self.signed = await fetch_manifest(self.host, self.invite)
        stages = self.signed.manifest.stages.count
        self._directory = await Directory.join(self.host, self.signed.run, stages)
        await self.host.subscribe(metrics_topic(self.signed.run), self._hear)
        return self.signed

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

    def seconds_since(self, sighting: Sighting) -> float:
        return monotonic() - sighting.at

    def round_loss(self, round_: int) -> float | None:
        """Mean loss of a round's slots in nats a token; None until all of them are known."""
        size = self.signed.manifest.batch.microbatches
        known = [self.losses.get(slot) for slot in range(round_ * size, (round_ + 1) * size)]
        values = [loss for loss in known if loss is not None]
        return sum(values) / size if len(values) == size else None

    async def stop(self) -> None:
        if hasattr(self, "host"):
            await self.host.stop()
