"""What a node tells others of itself: progress and metrics by gossip, a signed record in the DHT."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic, time

import structlog

from node.replica import Replica
from protocol import wire
from protocol.directory import Directory, PeerState, StageRecord
from protocol.errors import ProtocolError
from protocol.identity import Identity
from protocol.reports import MAX_SHUNNED, Metrics, SlotLoss, metrics_topic, progress_topic
from protocol.tasks import wait_for

log = structlog.get_logger("node")

REPORT_EVERY = 1.0
ANNOUNCE_EVERY = 8.0
_AT_MOST_EVERY = 0.05
_UNHURRIED = 0.25
_RATE_WINDOW = 10.0
_MAX_LOSSES = 2048


class Reporter:
    """Of one replica. `report_progress` runs until cancelled; `report_metrics` and `announce` are for a timer."""

    def __init__(
        self, replica: Replica, directory: Directory, identity: Identity, addresses: list[str]
    ) -> None:
        self._replica, self._directory, self._identity = replica, directory, identity
        self._addresses = tuple(addresses[:8])
        self._done: list[tuple[float, int]] = []

    async def report_progress(self) -> None:
        """Tell the stage how far we are: soon after a change that others act on, less often otherwise."""
        replica = self._replica
        topic = progress_topic(replica.run, replica.stage)
        while True:
            self._reported = own = replica.note_own_progress()
            with suppress(ProtocolError):  # What counts is said again soon.
                await replica.host.publish(topic, wire.encode(own))
            await asyncio.sleep(_AT_MOST_EVERY)
            await wait_for(replica.progress_due, REPORT_EVERY)
            # Every report costs every peer: signed, passed on, checked, read.
            unhurried = monotonic() + _UNHURRIED
            while not self._is_pressing() and (left := unhurried - monotonic()) > 0:
                await wait_for(replica.progress_due, left)

    def _is_pressing(self) -> bool:
        """Whether a round waits for what we have to say: a new version or state, or the last microbatches."""
        replica, last = self._replica, self._reported
        rounds = replica.rounds
        if (last.version, last.state) != (rounds.version, replica.state):
            return True
        return len(rounds.slots()) != len(last.slots) and replica.is_round_ending()

    async def report_metrics(self) -> None:
        self._replica.pipeline.check_timeouts()
        self._replica.check_waiting()
        await self._replica.host.publish(metrics_topic(self._replica.run), wire.encode(self.metrics()))

    def metrics(self) -> Metrics:
        replica = self._replica
        counts, streams = replica.pipeline.counts, replica.switchboard.links.values()
        losses = sorted(replica.pipeline.losses.items())[-_MAX_LOSSES:]
        return Metrics(
            stage=replica.stage,
            version=replica.rounds.version,
            digest=replica.rounds.standing.digest,
            state=replica.state,
            microbatches=counts["microbatches"],
            lost=counts["lost"],
            rerouted=counts["rerouted"],
            in_flight=len(replica.pipeline.flights),
            tokens_per_second=self._tokens_per_second(),
            sent_bytes=sum(stream.sent_bytes for link in streams for stream in link.streams),
            refused={reason.value: count for reason, count in replica.switchboard.refusals.counts.items()},
            losses=tuple(SlotLoss(slot, loss) for slot, loss in losses),
            waiting_for=replica.waiting_for,
            guarded=sum(guard.checked for guard in replica.passes.guards.values()),
            guard_seconds=replica.passes.guard_seconds,
            redo_seconds=replica.witness.seconds,
            to_banned=counts["to_banned"],
            shunned=tuple(replica.pipeline.shunned[-MAX_SHUNNED:]),
        )

    def _tokens_per_second(self) -> float:
        """Over the last ten seconds."""
        now, batch = monotonic(), self._replica.manifest.batch
        self._done = [(at, count) for at, count in self._done if now - at < _RATE_WINDOW]
        self._done.append((now, self._replica.pipeline.counts["microbatches"]))
        (began, first), (_, last) = self._done[0], self._done[-1]
        elapsed = now - began
        return (last - first) * batch.sequences * batch.context / elapsed if elapsed > 0 else 0.0

    async def announce(self) -> None:
        if not await self._directory.announce(self._record(self._replica.state), self._identity):
            log.warning("no DHT node stored our record; others may not find us yet")

    async def withdraw(self) -> None:
        """Replace our record by one that says that we left."""
        await self._directory.announce(self._record(PeerState.LEFT), self._identity)

    def _record(self, state: PeerState) -> StageRecord:
        replica, metrics = self._replica, self.metrics()
        return StageRecord(
            run=replica.run,
            peer=replica.peer_id,
            stage=replica.stage,
            state=state,
            addresses=self._addresses,
            version=metrics.version,
            digest=metrics.digest,
            throughput=metrics.tokens_per_second,
            load=metrics.in_flight / replica.pipeline.capacity,
            capacity=replica.pipeline.capacity,
            stated=time(),
        )
