"""One volunteer, from the invite to the last round: joins, serves a stage, leaves."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time

import psutil
import structlog
import torch

from node.compute import ComputeThread, Urgency
from node.data import open_corpus
from node.flights import Phase
from node.model import parameter_bytes
from node.passes import StagePasses
from node.pipeline import Pipeline
from node.progress import StageProgress, next_slot
from node.rounds import StageRounds
from node.trainer import StageTrainer
from node.transfer import CHUNK_BYTES, Checkpoint, StateServer
from protocol import wire
from protocol.directory import Directory, PeerState, StageRecord
from protocol.errors import ProtocolError, UserError
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import fetch_manifest
from protocol.invite import Invite
from protocol.links import Link, Switchboard
from protocol.manifest import Manifest
from protocol.receipts import MAX_ATTEMPT, MicrobatchId
from protocol.reports import Metrics, Progress, SlotLoss, metrics_topic, progress_topic

log = structlog.get_logger("node")

_ANNOUNCE_EVERY = 8.0
_LOOK_EVERY = 2.0
_REPORT_EVERY = 1.0
_REPORT_AT_MOST_EVERY = 0.05
_CHECKPOINT_EVERY = 30.0
_LEAVE_WITHIN = 10.0
_STATE_WITHIN = 20.0
_MAX_GOSSIPED_SLOTS = 4096
_STATE_COPIES = 5
"""Weights, gradient, two moments and a copy while a step runs: the stage's memory in units of its weights."""


@dataclass(frozen=True)
class VolunteerConfig:
    """`stage` None: the least served that fits. `link_delay`: seconds added to all we send, for experiments."""

    invite: Invite
    identity: Path
    cache_dir: Path
    stage: int | None = None
    device: str = "auto"
    listen: Sequence[str] = DEFAULT_LISTEN
    link_delay: float = 0.0
    capacity: int = 16
    hold_bytes: int = 256 << 20


@dataclass(frozen=True)
class Snapshot:
    """A node's situation, for the panel and the logs."""

    stage: int
    state: PeerState
    metrics: Metrics
    replicas: int
    next_hops: int
    holding: int
    loss: float | None


@dataclass
class _Pace:
    """Tokens per second over the last few seconds."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def measure(self, microbatches: int, tokens: int) -> float:
        now = monotonic()
        self.samples = [(at, count) for at, count in self.samples if now - at < 10.0] + [(now, microbatches)]
        (began, first), elapsed = self.samples[0], now - self.samples[0][0]
        return (microbatches - first) * tokens / elapsed if elapsed > 0 and began else 0.0


def choose_device(name: str) -> torch.device:
    """Raises `UserError` for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name} is no device", "Use --device auto, cpu or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"This machine has no {name}", "Use --device auto") from None
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that a stage may take on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_fits(manifest: Manifest, stage: int, device: torch.device) -> None:
    """Raises `UserError` if the stage's weights, gradients and optimizer do not fit in the device's free memory."""
    need, have = _STATE_COPIES * parameter_bytes(manifest, stage), free_memory(device)
    if need > have:
        raise UserError(
            f"Stage {stage} needs {need / 2**30:.2f} GiB on {device}, and {have / 2**30:.2f} GiB are free",
            "Free memory, use another --device, or join a run with smaller stages",
        )


def _fits(manifest: Manifest, stage: int, device: torch.device) -> bool:
    try:
        check_fits(manifest, stage, device)
    except UserError:
        return False
    return True


class Volunteer:
    """`start`, then `wait` until the run is over or `stop` is called. `stop` on every path."""

    def __init__(self, config: VolunteerConfig) -> None:
        self._config = config
        self._device = choose_device(config.device)
        self._identity = Identity.load_or_create(config.identity)
        self._tasks: list[asyncio.Task[None]] = []
        self._pace = _Pace()
        self._injections: dict[int, int] = {}
        self._has_begun = False
        self._waiting_for = -1
        self._failure: asyncio.Future[None] | None = None
        self._addresses: list[str] = []
        self._progress_due = asyncio.Event()
        self._room = asyncio.Event()
        self.state = PeerState.JOINING
        self.stage = -1
        self.peer_id = self._identity.peer_id

    # --- joining ---

    async def start(self) -> None:
        """Join the run and serve. Raises `UserError` for what a person can mend."""
        config = self._config
        self._failure = asyncio.get_running_loop().create_future()
        self.host = await Host.start(config.identity, listen=config.listen, seeds=config.invite.seeds)
        self.signed = await fetch_manifest(self.host, config.invite)
        self.manifest = self.signed.manifest
        self._directory = await Directory.join(self.host, self.signed.run, self.manifest.stages.count)
        self._addresses = (await self.host.addresses())[:8]
        self.stage = await self._choose_stage()
        check_fits(self.manifest, self.stage, self._device)
        self._checkpoint = Checkpoint(config.cache_dir, self.signed.run, self.stage)
        self._checkpoint.prepare()
        log.info("joining", peer=self.peer_id, stage=self.stage, device=str(self._device))
        await self._assemble()
        await self.switchboard.start()
        await self._listen_to_gossip()
        self._spawn(self._every(_LOOK_EVERY, self._look_for_neighbours))
        self._spawn(self._every(_REPORT_EVERY, self._report_metrics))
        self._spawn(self._report_progress())
        self._spawn(self._every(_ANNOUNCE_EVERY, self._announce))
        await self._acquire_state()
        self.state = PeerState.SERVING
        self._state_server.is_ready = True
        self.pipeline.is_accepting = True
        self._spawn(self.rounds.run())
        self._spawn(self._every(_CHECKPOINT_EVERY, self._save_checkpoint))
        if self.stage == 0:
            self._spawn(self._inject())
        await self._announce()
        log.info("serving", peer=self.peer_id, stage=self.stage, version=self.rounds.version)

    async def _choose_stage(self) -> int:
        count = self.manifest.stages.count
        if self._config.stage is not None:
            if self._config.stage >= count:
                raise UserError(
                    f"This run has no stage {self._config.stage}", f"Choose one from 0 to {count - 1}"
                )
            return self._config.stage
        fitting = [stage for stage in range(count) if _fits(self.manifest, stage, self._device)]
        if not fitting:
            check_fits(self.manifest, 0, self._device)
        served = {stage: len(await self._directory.peers(stage)) for stage in fitting}
        # Of equally served stages each peer begins elsewhere, so that those who join together spread.
        offset = hashlib.blake2b(self.peer_id.encode(), digest_size=4).digest()[0]
        return min(fitting, key=lambda stage: (served[stage], (stage - offset) % count))

    async def _assemble(self) -> None:
        manifest, stage = self.manifest, self.stage
        corpus = (
            await asyncio.to_thread(open_corpus, manifest, self._config.cache_dir) if stage == 0 else None
        )
        self.compute = ComputeThread()
        trainer = await self.compute.run(Urgency.ROUND, StageTrainer, manifest, stage, self._device)
        self._passes = StagePasses(manifest, trainer, corpus, self._device)
        self.switchboard = Switchboard(
            self.host,
            self.signed.run,
            stage=stage,
            max_tensor=self._passes.payload_size,
            owner=self,
            delay=self._config.link_delay,
        )
        self._replicas = StageProgress(manifest)
        self._heads = self._replicas if stage == 0 else StageProgress(manifest)
        self.pipeline = Pipeline(
            manifest,
            stage,
            self._identity,
            self.switchboard,
            self.compute,
            self._passes,
            self._replicas,
            self._on_change,
            capacity=self._config.capacity,
            hold_bytes=self._config.hold_bytes,
        )
        self.pipeline.is_accepting = False
        self._state_server = StateServer(self.switchboard, self.compute, trainer)
        self.rounds = StageRounds(
            manifest,
            stage,
            self.switchboard,
            self.compute,
            self._passes,
            self._replicas,
            self._heads,
            self._on_version,
        )
        await self.rounds.start()

    async def _listen_to_gossip(self) -> None:
        run = self.signed.run
        await self.host.subscribe(progress_topic(run, self.stage), self._on_progress)
        if self.stage != 0:
            await self.host.subscribe(progress_topic(run, 0), self._on_head_progress)

    async def _acquire_state(self) -> None:
        """From replicas if there are any; else from our disk; else the initial weights at the run's version."""
        await self._look_for_neighbours()
        deadline = monotonic() + _STATE_WITHIN
        quiet_until = monotonic() + 2 * _REPORT_EVERY + 4 * self._config.link_delay
        while monotonic() < deadline:
            others = await self._serving_replicas()
            heard = any(peer != self.peer_id for peer in self._replicas.replicas())
            if not others and monotonic() > quiet_until:
                break
            if heard and await self.rounds.resync():
                return
            await asyncio.sleep(0.2)
        else:
            log.warning("no replica gave its state in time", stage=self.stage)
        if await self.compute.run(Urgency.ROUND, self._checkpoint.load, self._passes.trainer):
            await self.rounds.start()
        if self._heads.newest() > self.rounds.version:
            log.warning("the stage's state is lost; it goes on from what this node has", stage=self.stage)
            await self.rounds.jump(self._heads.newest())

    async def _serving_replicas(self) -> list[PeerId]:
        records = await self._directory.peers(self.stage)
        ready = (PeerState.SERVING, PeerState.WAITING, PeerState.FINISHED)
        return [peer for peer, record in records.items() if peer != self.peer_id and record.state in ready]

    # --- what others tell us ---

    def on_link_up(self, link: Link) -> None:
        log.debug("link up", peer=link.peer, stage=link.stage)
        self.pipeline.on_link_up(link)

    def on_link_down(self, link: Link) -> None:
        log.info("link down", peer=link.peer, stage=link.stage)
        for progress in (self._replicas, self._heads):
            progress.forget(link.peer)
        self.pipeline.on_link_down(link)
        self.rounds.news.set()
        self._room.set()

    def on_message(self, link: Link, message: wire.Message, payload: memoryview) -> None:
        self.pipeline.on_message(link, message, payload)

    def _on_progress(self, author: PeerId, data: bytes) -> None:
        self._hear(self._replicas, self.stage, author, data)

    def _on_head_progress(self, author: PeerId, data: bytes) -> None:
        self._hear(self._heads, 0, author, data)

    def _hear(self, table: StageProgress, stage: int, author: PeerId, data: bytes) -> None:
        if author == self.peer_id:
            return
        try:
            progress = wire.decode(Progress, data)
        except ProtocolError as error:
            self.switchboard.refusals.count(author, error)
            return
        if progress.stage != stage:
            return
        table.hear(author, progress, monotonic())
        self.rounds.news.set()
        if stage == self.stage == 0:
            self._room.set()

    # --- what we tell others ---

    def _on_version(self) -> None:
        self._state_server.settled = tuple(sorted(self.rounds.settled))[-_MAX_GOSSIPED_SLOTS:]
        if self.rounds.is_over and self.state is PeerState.SERVING:
            self.state = PeerState.FINISHED
            log.info("the run is over", version=self.rounds.version)
        self.pipeline.on_version()
        self._on_change()

    def _own_progress(self) -> Progress:
        in_flight = tuple(
            flight.id.slot for flight in self.pipeline.flights.values() if flight.previous is None
        )
        return self.rounds.progress(self.state, in_flight)

    async def _report_progress(self) -> None:
        """Tell the stage how far we are: soon after a change, and once a second anyway."""
        topic = progress_topic(self.signed.run, self.stage)
        while True:
            own = self._own_progress()
            self._replicas.hear(self.peer_id, own, monotonic())
            self.rounds.news.set()
            with suppress(OSError, asyncio.IncompleteReadError):
                await self.host.publish(topic, wire.encode(own))
            await asyncio.sleep(_REPORT_AT_MOST_EVERY)
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_EVERY):
                    await self._progress_due.wait()
            self._progress_due.clear()

    def _on_change(self) -> None:
        """Something ended or room appeared: our own entry in the round must say so at once."""
        self._replicas.hear(self.peer_id, self._own_progress(), monotonic())
        self.rounds.news.set()
        self._progress_due.set()
        self._room.set()

    def metrics(self) -> Metrics:
        counts, batch = self.pipeline.counts, self.manifest.batch
        losses = sorted(self.pipeline.losses.items())[-_MAX_GOSSIPED_SLOTS // 2 :]
        return Metrics(
            stage=self.stage,
            version=self.rounds.version,
            digest=self.rounds.digest,
            state=self.state,
            microbatches=counts["microbatches"],
            lost=counts["lost"],
            rerouted=counts["rerouted"],
            in_flight=len(self.pipeline.flights),
            tokens_per_second=self._pace.measure(counts["microbatches"], batch.sequences * batch.context),
            sent_bytes=sum(
                stream.sent_bytes for link in self.switchboard.links.values() for stream in link.streams
            ),
            refused={reason.value: count for reason, count in self.switchboard.refusals.counts.items()},
            losses=tuple(SlotLoss(slot, loss) for slot, loss in losses),
            waiting_for=self._waiting_for,
        )

    async def _report_metrics(self) -> None:
        self.pipeline.check_timeouts()
        self.switchboard_state()
        await self.host.publish(metrics_topic(self.signed.run), wire.encode(self.metrics()))

    def switchboard_state(self) -> None:
        """Say, once, when we begin or cease to wait for the next stage."""
        is_last = self.stage == self.manifest.stages.count - 1
        stuck = any(flight.phase is Phase.UNSENT for flight in self.pipeline.flights.values())
        waiting_for = self.stage + 1 if not is_last and stuck and not self.pipeline.next_hops() else -1
        if waiting_for != self._waiting_for:
            self._waiting_for = waiting_for
            if waiting_for >= 0:
                log.warning("waiting for a replica of the next stage", stage=waiting_for)
            else:
                log.info("no longer waiting")
        if self.state in (PeerState.SERVING, PeerState.WAITING):
            self.state = PeerState.WAITING if waiting_for >= 0 else PeerState.SERVING

    def record(self, state: PeerState) -> StageRecord:
        metrics = self.metrics()
        return StageRecord(
            run=self.signed.run,
            peer=self.peer_id,
            stage=self.stage,
            state=state,
            addresses=tuple(self._addresses),
            version=metrics.version,
            digest=metrics.digest,
            throughput=metrics.tokens_per_second,
            load=metrics.in_flight / self.pipeline.capacity,
            capacity=self.pipeline.capacity,
            stated=time(),
        )

    async def _announce(self) -> None:
        if not await self._directory.announce(self.record(self.state), self._identity):
            log.warning("no DHT node stored our record; others may not find us yet")

    # --- neighbours ---

    async def _look_for_neighbours(self) -> None:
        """Keep a link to the replicas of our own stage and of the next one."""
        stages = [self.stage, self.stage + 1] if self.stage + 1 < self.manifest.stages.count else [self.stage]
        for stage in stages:
            for peer, record in (await self._directory.peers(stage)).items():
                link = self.switchboard.links.get(peer)
                if peer != self.peer_id and (link is None or not link.is_up):
                    self._spawn(self._meet(peer, record))

    async def _meet(self, peer: PeerId, record: StageRecord) -> None:
        with suppress(ProtocolError):
            await self.switchboard.connect(peer, record.addresses)

    # --- injecting, on a head ---

    async def _inject(self) -> None:
        """Draw our share of the run's slots and send them on their way, as room and schedule allow."""
        pipeline = self.pipeline
        while True:
            self._room.clear()
            while (slot := await self._next_slot()) is not None:
                attempt = self._injections.get(slot, -1) + 1
                if attempt > MAX_ATTEMPT:
                    self.rounds.settled.add(slot)
                    log.error("a slot was lost too often and is left out", slot=slot)
                    continue
                self._injections[slot] = attempt
                pipeline.inject(MicrobatchId(self.peer_id, slot, attempt))
            oldest = (self.rounds.version - 4) * self.manifest.batch.microbatches
            self._injections = {slot: n for slot, n in self._injections.items() if slot >= oldest}
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_EVERY):
                    await self._room.wait()

    async def _next_slot(self) -> int | None:
        pipeline = self.pipeline
        if self.rounds.is_over or self.state is PeerState.LEAVING or not await self._may_begin():
            return None
        # Work that the next stage has no room for yet would only take memory here.
        unsent = sum(
            1 for flight in pipeline.flights.values() if flight.phase in (Phase.FORWARD, Phase.UNSENT)
        )
        if len(pipeline.flights) >= pipeline.capacity or unsent >= 2:
            return None
        taken = {flight.id.slot for flight in pipeline.flights.values()} | set(self.rounds.slots())
        return next_slot(self._heads, self.peer_id, self.rounds.version, taken | self.rounds.settled)

    async def _may_begin(self) -> bool:
        """Before the first round: whether every stage has the replicas that the manifest asks for."""
        if self._has_begun or self.rounds.version > 0:
            return True
        needed = self.manifest.schedule.min_replicas
        for stage in range(self.manifest.stages.count):
            records = await self._directory.peers(stage)
            serving = sum(
                record.state in (PeerState.SERVING, PeerState.WAITING) for record in records.values()
            )
            if serving < needed:
                await asyncio.sleep(0.25)
                return False
        if len(self._heads.replicas()) < needed:
            return False
        self._has_begun = True
        return True

    # --- the rest ---

    async def _save_checkpoint(self) -> None:
        if self.rounds.version > 0:
            chunks = await self.compute.run(Urgency.ROUND, self._passes.trainer.state_chunks, CHUNK_BYTES)
            await asyncio.to_thread(self._checkpoint.save, chunks)

    def snapshot(self) -> Snapshot:
        losses = list(self.pipeline.losses.values())[-self.manifest.batch.microbatches :]
        return Snapshot(
            stage=self.stage,
            state=self.state,
            metrics=self.metrics(),
            replicas=len(self._replicas.replicas()),
            next_hops=len(self.pipeline.next_hops()),
            holding=self.pipeline.finished.bytes,
            loss=sum(losses) / len(losses) if losses else None,
        )

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _every(self, seconds: float, action: Callable[[], Awaitable[None]]) -> None:
        """Again and again; what the network does to one turn is logged and the next one tried."""
        while True:
            try:
                await action()
            except (ProtocolError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                log.warning("will be tried again", action=action.__name__, reason=str(error))
            await asyncio.sleep(seconds)

    async def wait(self) -> None:
        """Until a task fails (raises its error); a run that is over is still served until `stop`."""
        assert self._failure is not None
        await asyncio.shield(self._failure)

    async def leave(self) -> None:
        """Take no more, finish or hand back what we hold, bring our gradients into the round, withdraw our record."""
        self.state = PeerState.LEAVING
        self.pipeline.is_accepting = False
        self._progress_due.set()
        deadline = monotonic() + _LEAVE_WITHIN
        await self._until(lambda: not self.pipeline.flights, deadline)
        self.pipeline.hand_back()
        version = self.rounds.version
        if len(self._replicas.members(version)) > 1:
            await self._until(lambda: not self.rounds.slots() or self.rounds.version > version, deadline)
        with suppress(ProtocolError, OSError, TimeoutError):
            async with asyncio.timeout(3.0):
                await self._directory.announce(self.record(PeerState.LEFT), self._identity)
        log.info("left", peer=self.peer_id, version=self.rounds.version)

    async def _until(self, is_done: Callable[[], bool], deadline: float) -> None:
        while not is_done() and (left := deadline - monotonic()) > 0:
            self._room.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._room.wait()

    async def stop(self) -> None:
        """Free everything, whatever state we are in; p2pd first of all."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "rounds"):
            await self.rounds.stop()
            await self.pipeline.stop()
            await self.switchboard.stop()
            self.compute.stop()
        if hasattr(self, "host"):
            await self.host.stop()
