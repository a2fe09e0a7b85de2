"""One volunteer, from the invite to the last round: joins, serves a stage, leaves."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time

import structlog

from node.bans import explain_ban, remembered_ban
from node.compute import Urgency
from node.data import open_corpus
from node.head import Injector
from node.heap import touch
from node.placement import check_fits, choose_device, fitting_stages, least_served
from node.replica import Limits, Replica
from node.reporting import ANNOUNCE_EVERY, REPORT_EVERY, Reporter
from node.sabotage import AttackConfig, Sabotage
from node.transfer import Checkpoint
from protocol.directory import Directory, PeerState, StageRecord
from protocol.errors import BannedError, ProtocolError, UserError
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import fetch_manifest
from protocol.invite import Invite
from protocol.manifest import Manifest
from protocol.reports import Metrics
from protocol.samples import ALARM_EVERY
from protocol.tasks import TaskSet
from protocol.votes import SignedVote

log = structlog.get_logger("node")

_LOOK_OFTEN = 2.0
_LOOK_SELDOM = 10.0
_SETTLING = 10.0
_MEET_EVERY = 0.5
_CHECKPOINT_EVERY = 30.0
_LEAVE_WITHIN = 10.0
_WITHDRAW_WITHIN = 3.0
_STATE_WITHIN = 20.0
_REACHABLE_WITHIN = 5.0
_STATE_POLL = 0.2
_ACQUAINTANCES = 3
_HOLDS_STATE = (PeerState.SERVING, PeerState.WAITING, PeerState.FINISHED)


@dataclass(frozen=True)
class VolunteerConfig:
    """`stage` None: the least served that fits. `attack` is for testbeds."""

    invite: Invite
    identity: Path
    cache_dir: Path
    stage: int | None = None
    device: str = "auto"
    listen: Sequence[str] = DEFAULT_LISTEN
    limits: Limits = field(default_factory=Limits)
    attack: AttackConfig | None = None


@dataclass(frozen=True)
class Snapshot:
    """A volunteer's situation, for the panel. `holding`: bytes; `loss`: of the last round's slots, on a tail."""

    metrics: Metrics
    replicas: int
    holding: int
    loss: float | None


class Volunteer:
    """`start`, then `wait` until something fails or `leave` is called. `stop` on every path."""

    def __init__(self, config: VolunteerConfig) -> None:
        self._config = config
        self._device = choose_device(config.device)
        self._identity = Identity.load_or_create(config.identity)
        self.peer_id = self._identity.peer_id
        self._tasks: TaskSet | None = None
        self._host: Host | None = None
        self._replica: Replica | None = None
        self._neighbours: dict[PeerId, StageRecord] = {}
        self._began = self._looked_at = 0.0

    @property
    def replica(self) -> Replica:
        """What serves the stage; there once `start` has chosen one."""
        assert self._replica is not None
        return self._replica

    @property
    def manifest(self) -> Manifest:
        return self.replica.manifest

    # --- joining ---

    async def start(self) -> None:
        """Join the run and serve. Raises `UserError` for what a person can mend."""
        config = self._config
        log.debug("starting", peer=self.peer_id)
        self._tasks = tasks = TaskSet()
        self._host = host = await Host.start(config.identity, listen=config.listen, seeds=config.invite.seeds)
        tasks.spawn(host.watch())
        try:
            signed = await fetch_manifest(host, config.invite)
        except BannedError:
            # Nobody talks to us; but we may have been told why before.
            raise self._ban(remembered_ban(self._votes_path(config.invite.run), self.peer_id)) from None
        if config.attack is not None and not signed.manifest.testbed:
            raise UserError("This run is no testbed, so nobody may attack it", "Leave out --attack")
        stages = signed.manifest.stages.count
        self._directory = await Directory.join(host, signed.run, stages)
        stage = await self._choose_stage(signed.manifest)
        self._checkpoint = Checkpoint(config.cache_dir, signed.run, stage)
        self._checkpoint.prepare()
        log.info("joining", peer=self.peer_id, stage=stage, device=str(self._device))
        corpus = (
            await asyncio.to_thread(open_corpus, signed.manifest, config.cache_dir) if stage == 0 else None
        )
        self._replica = replica = await Replica.build(
            signed,
            stage,
            self._identity,
            host,
            self._device,
            config.limits,
            seeds=config.invite.seeds,
            votes_path=self._votes_path(signed.run),
        )
        await replica.compute.run(Urgency.ROUND, touch, config.limits.touched_bytes)
        if config.attack is not None:
            self._become_attacker(config.attack)
        self._reporter = Reporter(replica, self._directory, self._identity, await host.addresses())
        await replica.start(await self._acquaintances())
        if replica.is_banned.is_set():
            raise self._ban(self._votes_against_us())
        tasks.spawn(self._watch_for_ban())
        tasks.spawn(replica.ballots.run())
        self._began = monotonic()
        tasks.every(_LOOK_OFTEN, self._look_around)
        tasks.every(_MEET_EVERY, self._meet_neighbours)
        tasks.every(REPORT_EVERY, self._reporter.report_metrics)
        tasks.every(ANNOUNCE_EVERY, self._reporter.announce)
        tasks.spawn(self._reporter.report_progress())
        await self._acquire_state()
        replica.serve()
        tasks.spawn(replica.rounds.run())
        tasks.spawn(replica.pipeline.watch())
        tasks.every(ALARM_EVERY, replica.witness.sound_alarm)
        tasks.every(_CHECKPOINT_EVERY, self._save_checkpoint)
        if corpus is not None:
            injector = Injector(replica, self._directory, corpus)
            replica.witness.draw = injector.draw
            tasks.spawn(injector.run())
        await self._reporter.announce()
        log.info("serving", peer=self.peer_id, stage=stage, version=replica.rounds.version)

    async def _acquaintances(self) -> list[tuple[PeerId, Sequence[str]]]:
        """A few peers beside the seeds to ask for votes: one alone could keep a ban from us."""
        try:
            records = await self._directory.peers(self.replica.stage)
        except ProtocolError:
            return []
        others = [(peer, record.addresses) for peer, record in records.items() if peer != self.peer_id]
        return random.sample(others, min(_ACQUAINTANCES, len(others)))

    async def _watch_for_ban(self) -> None:
        """Until cancelled. Raises `BannedError` when we are banned."""
        await self.replica.is_banned.wait()
        raise self._ban(self._votes_against_us())

    def _votes_path(self, run: bytes) -> Path:
        return self._config.cache_dir / run.hex()[:16] / f"{self.peer_id}.votes"

    def _votes_against_us(self) -> list[SignedVote]:
        return list(self.replica.votes.bans(time()).get(self.peer_id, {}).values())

    def _ban(self, votes: Sequence[SignedVote]) -> BannedError:
        quorum = 1 if self._replica is None else self.manifest.verification.quorum
        return BannedError(explain_ban(self.peer_id, votes, quorum))

    def _become_attacker(self, attack: AttackConfig) -> None:
        passes = self.replica.passes
        passes.sabotage = Sabotage(attack, self.replica.stage, self.peer_id, self.manifest.seed)
        passes.trainer.memory = max(passes.trainer.memory, passes.sabotage.weight_memory)
        passes.trainer.memory_seconds = math.inf
        log.warning("this node attacks the run, as it was told to", stage=self.replica.stage)

    async def _choose_stage(self, manifest: Manifest) -> int:
        wanted, count = self._config.stage, manifest.stages.count
        if wanted is None:
            # Sizing a stage imports the model's architecture, which takes seconds: not on the event loop.
            fitting = await asyncio.to_thread(fitting_stages, manifest, self._device)
            served = {stage: len(await self._directory.peers(stage)) for stage in fitting}
            return least_served(served, self.peer_id)
        if wanted >= count:
            raise UserError(f"This run has no stage {wanted}", f"Choose one from 0 to {count - 1}")
        await asyncio.to_thread(check_fits, manifest, wanted, self._device)
        return wanted

    async def _acquire_state(self) -> None:
        """From replicas if there are any; else from our disk; else the initial weights at the run's version."""
        replica = self.replica
        began = monotonic()
        # Whoever holds the state reports once a second.
        quiet = 2 * REPORT_EVERY + 4 * self._config.limits.link_delay
        while monotonic() < began + _STATE_WITHIN:
            if (
                any(peer != self.peer_id for peer in replica.replicas.replicas())
                and await replica.rounds.resync()
            ):
                return
            if monotonic() > began + quiet and not await self._is_stage_served(began + _REACHABLE_WITHIN):
                break
            await asyncio.sleep(_STATE_POLL)
        else:
            log.warning("no replica gave its state in time", stage=replica.stage)
        if await replica.compute.run(Urgency.ROUND, self._checkpoint.load, replica.passes.trainer):
            await replica.rounds.start()
        version = await self._run_version()
        if version > replica.rounds.version:
            log.warning("the stage's state is lost; it goes on from what this node has", stage=replica.stage)
            await replica.rounds.jump(version)

    async def _run_version(self) -> int:
        """How far the run is: by its heads; for a head that finds no other, by what half of the next stage says."""
        replica = self.replica
        if replica.stage != 0 or replica.is_last:
            return replica.heads.newest()
        records = (await self._directory.peers(1)).values()
        versions = sorted(record.version for record in records if record.state in _HOLDS_STATE)
        rounds = replica.manifest.schedule.rounds
        return min(versions[len(versions) // 2], rounds) if versions else -1

    async def _is_stage_served(self, reachable_from: float) -> bool:
        """Whether somebody is on record who holds the state; from that moment on, somebody who can be reached: the
        records of those who crashed stay for a while."""
        try:
            records = await self._directory.peers(self.replica.stage)
        except ProtocolError:
            return True  # For all we know.
        holders = {
            peer: record.addresses
            for peer, record in records.items()
            if peer != self.peer_id and record.state in _HOLDS_STATE
        }
        if monotonic() < reachable_from:
            return bool(holders)
        return any(await asyncio.gather(*(self._is_reachable(*holder) for holder in holders.items())))

    async def _is_reachable(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        try:
            await self.replica.switchboard.connect(peer, addresses)
        except ProtocolError:
            return False
        return True

    async def _look_around(self) -> None:
        """Read who serves our own stage and those beside it: often at first and while a stage is missing, then seldom,
        since who comes later dials us."""
        replica, now = self.replica, monotonic()
        is_settled = now - self._began > _SETTLING and replica.waiting_for < 0
        if is_settled and now - self._looked_at < _LOOK_SELDOM:
            return
        self._looked_at = now
        last = replica.manifest.stages.count - 1
        found: dict[PeerId, StageRecord] = {}
        for stage in range(max(0, replica.stage - 1), min(replica.stage + 1, last) + 1):
            found |= await self._directory.peers(stage)
        found.pop(self.peer_id, None)
        self._neighbours = found

    async def _meet_neighbours(self) -> None:
        """Keep a link to each neighbour. One that was lost is dialled again without asking the DHT, which may be slow
        just then: it is the same peers that are gone."""
        for peer, record in self._neighbours.items():
            self.replica.switchboard.keep(peer, record.addresses)

    # --- serving ---

    async def wait(self) -> None:
        """Until a task fails (raises its error); a run that is over is served until `stop`."""
        assert self._tasks is not None
        await self._tasks.wait()

    async def _save_checkpoint(self) -> None:
        if self.replica.rounds.version > 0:
            chunks = await self.replica.state_chunks()
            await asyncio.to_thread(self._checkpoint.save, chunks)

    def snapshot(self) -> Snapshot:
        replica = self.replica
        losses = list(replica.pipeline.losses.values())[-replica.manifest.batch.microbatches :]
        return Snapshot(
            metrics=self._reporter.metrics(),
            replicas=len(replica.replicas.replicas()),
            holding=replica.pipeline.finished.bytes,
            loss=sum(losses) / len(losses) if losses else None,
        )

    # --- leaving ---

    async def leave(self) -> None:
        """Finish or hand back what we hold, bring our gradients into the round, withdraw our record."""
        await self.replica.drain(monotonic() + _LEAVE_WITHIN)
        with suppress(ProtocolError, OSError, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_WITHIN):
                await self._reporter.withdraw()
        log.info("left", peer=self.peer_id, version=self.replica.rounds.version)

    async def stop(self) -> None:
        """Free everything, whatever state we are in."""
        if self._tasks is not None:
            await self._tasks.stop()
        if self._replica is not None:
            await self._replica.stop()
        if self._host is not None:
            await self._host.stop()
