"""One replica of a stage: the module, the data path and the rounds, and what its neighbours say to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import structlog
import torch

from node.compute import ComputeThread, Urgency
from node.flights import Phase
from node.passes import StagePasses
from node.pipeline import Pipeline
from node.progress import StageProgress
from node.rounds import StageRounds
from node.trainer import StageTrainer
from node.transfer import CHUNK_BYTES, StateServer
from node.witness import Witness
from protocol import wire
from protocol.ballots import Ballots
from protocol.codec import Payload
from protocol.directory import PeerState
from protocol.errors import ProtocolError, Reason
from protocol.host import Host
from protocol.identity import Identity, PeerId
from protocol.links import Link, Switchboard
from protocol.manifest import SignedManifest
from protocol.messages import Activation, Gradient
from protocol.reports import Progress, progress_topic
from protocol.tasks import wait_for
from protocol.vote_set import VoteSet
from protocol.votes import Verdict

log = structlog.get_logger("node")

_MAX_PAST = 12
"""Versions whose weights are kept at most. Rounds of a small model are short, and a verifier looks seconds later: of
161 questions in two demos one was about an older one. More are not worth their price: to touch new memory is slow."""
_PAST_FOR = 20.0
"""Seconds after which earlier weights are of no use: no verifier draws what ended so long ago."""


@dataclass(frozen=True)
class Limits:
    """`capacity`: microbatches held at once for the stage before; `hold_bytes`: of finished ones, kept a while.

    `past_bytes`: of earlier versions' weights, kept so that others' work can be done again (one version at least, where
    there are verifiers). `touched_bytes`: of the heap, before it serves; a stage of the tiny model comes to use it.
    `link_delay`: seconds added to all that is sent, for experiments.
    """

    capacity: int = 16
    hold_bytes: int = 256 << 20
    past_bytes: int = 256 << 20
    touched_bytes: int = 160 << 20
    link_delay: float = 0.0


class Replica:
    """Built by `build`; then `start`, and `serve` once its state is the run's. `stop` on every path."""

    def __init__(
        self,
        signed: SignedManifest,
        stage: int,
        identity: Identity,
        host: Host,
        compute: ComputeThread,
        passes: StagePasses,
        limits: Limits,
        seeds: Sequence[str],
        votes_path: Path | None,
    ) -> None:
        electorate = signed.electorate
        self.run, self.manifest, self.stage = signed.run, signed.manifest, stage
        self.peer_id, self.host, self.compute, self.passes = identity.peer_id, host, compute, passes
        self.state = PeerState.JOINING
        self.waiting_for = -1
        self.room = asyncio.Event()
        """Set when a microbatch ended, room appeared or a head reported: there may be something to inject."""
        self.progress_due = asyncio.Event()
        self.switchboard = Switchboard(
            host,
            self.run,
            stage=stage,
            owner=self,
            max_tensor=passes.payload_size,
            delay=limits.link_delay,
        )
        self.votes = VoteSet(electorate)
        self.is_banned = asyncio.Event()
        """Set once a quorum of verifiers bans this very peer."""
        self.switchboard.obey(self.votes)
        self.ballots = Ballots(self.switchboard, self.votes, seeds=seeds, path=votes_path)
        self.replicas = StageProgress(self.manifest)
        self.heads = self.replicas if stage == 0 else StageProgress(self.manifest)
        self.pipeline = Pipeline(
            self.manifest,
            stage,
            identity,
            self.switchboard,
            compute,
            passes,
            self.replicas,
            self._on_change,
            capacity=limits.capacity,
            hold_bytes=limits.hold_bytes,
        )
        self.pipeline.is_accepting = False
        self.pipeline.verdicts = self.votes.verdicts()
        self.rounds = StageRounds(
            self.manifest,
            stage,
            self.switchboard,
            compute,
            passes,
            self.replicas,
            self.heads,
            self._on_version,
        )
        self.witness = Witness(self.switchboard, self.votes, compute, passes, self.pipeline)
        if electorate.verifiers:
            passes.trainer.memory_seconds = _PAST_FOR
            passes.trainer.memory = max(1, min(_MAX_PAST, limits.past_bytes // (4 * passes.trainer.size)))
        self.votes.subscribe(self._on_verdict)
        self._state_server = StateServer(self.switchboard, compute, passes.trainer, self.rounds.held)

    @classmethod
    async def build(
        cls,
        signed: SignedManifest,
        stage: int,
        identity: Identity,
        host: Host,
        device: torch.device,
        limits: Limits,
        *,
        seeds: Sequence[str] = (),
        votes_path: Path | None = None,
    ) -> Replica:
        """With the stage's initial weights on `device`; the votes it knows are kept at `votes_path`.

        Raises `UserError` if the model cannot be cut.
        """
        compute = ComputeThread()
        trainer = await compute.run(Urgency.ROUND, StageTrainer, signed.manifest, stage, device)
        passes = StagePasses(signed.manifest, trainer, device)
        return cls(signed, stage, identity, host, compute, passes, limits, seeds, votes_path)

    async def start(self, known: Iterable[tuple[PeerId, Sequence[str]]] = ()) -> None:
        """Take links, ask the seeds and the peers `known` by id and addresses for all votes, and listen to the progress
        of the stage and of the heads."""
        await self.rounds.start()
        await self.switchboard.start()
        await self.ballots.start()
        await self.ballots.catch_up(known)
        await self.host.subscribe(
            progress_topic(self.run, self.stage), self._hearer(self.replicas, self.stage)
        )
        if self.stage != 0:
            await self.host.subscribe(progress_topic(self.run, 0), self._hearer(self.heads, 0))

    def serve(self) -> None:
        """From now on take activations, and give our state to who asks."""
        self.state = PeerState.SERVING
        self._state_server.is_ready = True
        self.pipeline.is_accepting = True

    @property
    def is_last(self) -> bool:
        return self.stage == self.manifest.stages.count - 1

    # --- what others tell us ---

    def on_link_up(self, link: Link) -> None:
        log.debug("link up", peer=link.peer, stage=link.stage)
        self.pipeline.on_link_up(link)

    def on_link_down(self, link: Link) -> None:
        log.info("link down", peer=link.peer, stage=link.stage)
        for progress in (self.replicas, self.heads):
            progress.forget(link.peer)
        self.pipeline.on_link_down(link)
        self.rounds.news.set()
        self.room.set()

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None:
        self.pipeline.on_announced(link, message, size)

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        self.pipeline.on_message(link, message, payload)

    def _hearer(self, table: StageProgress, stage: int) -> Callable[[PeerId, bytes], None]:
        """Takes gossiped progress of `stage` into `table`. The checks, in order, each IGNORE: own, banned, form, stage,
        version."""

        def hear(author: PeerId, data: bytes) -> None:
            if author == self.peer_id or self.votes.is_banned(author):
                return
            try:
                progress = wire.decode(Progress, data)
                if progress.stage != stage:
                    raise ProtocolError(Reason.WRONG_STAGE, f"progress of stage {progress.stage}")
                table.hear(author, progress, monotonic())
            except ProtocolError as error:
                self.switchboard.refusals.count(author, error)
                return
            self.rounds.news.set()
            if stage == self.stage == 0:
                self.room.set()

        return hear

    def _on_verdict(self, peer: PeerId, before: Verdict, after: Verdict) -> None:
        log.warning("verdict", peer=peer, before=before.value, after=after.value)
        if after is not Verdict.BANNED:
            self.pipeline.on_standing()
            return
        if peer == self.peer_id:
            self.is_banned.set()
        for progress in (self.replicas, self.heads):
            progress.forget(peer)
        self.pipeline.on_ban(peer)
        self.rounds.news.set()
        self.room.set()

    # --- what follows for us ---

    def _on_version(self) -> None:
        if self.rounds.is_over and self.state is PeerState.SERVING:
            self.state = PeerState.FINISHED
            log.info("the run is over", version=self.rounds.version)
        self.pipeline.on_version()
        self._on_change()

    def _on_change(self) -> None:
        """Something ended or room appeared: our own entry in the round must say so at once."""
        self.note_own_progress()
        self.progress_due.set()
        self.room.set()

    def note_own_progress(self) -> Progress:
        """Our entry in the stage's round, as of now."""
        injected = (flight.id.slot for flight in self.pipeline.flights.values() if flight.previous is None)
        own = self.rounds.progress(self.state, tuple(injected))
        self.replicas.hear(self.peer_id, own, monotonic())
        self.rounds.news.set()
        return own

    def is_round_ending(self) -> bool:
        """Whether others soon have to act on what we report: the stage's round is three quarters full."""
        version = self.rounds.version
        return 4 * self.replicas.missing(version) <= self.manifest.batch.microbatches

    def check_waiting(self) -> None:
        """Say, once, when we begin or cease to wait for a stage that nobody serves: the next one, or the heads."""
        waiting_for = self._unserved_stage()
        if waiting_for != self.waiting_for:
            self.waiting_for = waiting_for
            if waiting_for >= 0:
                log.warning("waiting for a replica of a stage that nobody serves", stage=waiting_for)
            else:
                log.info("no longer waiting")
        if self.state in (PeerState.SERVING, PeerState.WAITING):
            self.state = PeerState.WAITING if waiting_for >= 0 else PeerState.SERVING

    def _unserved_stage(self) -> int:
        """The stage for lack of whose replicas we have nothing to do; -1 if there is none."""
        stuck = any(flight.phase is Phase.UNSENT for flight in self.pipeline.flights.values())
        if stuck and not self.is_last and not self.pipeline.next_hops():
            return self.stage + 1
        return 0 if self.stage and not self.rounds.is_over and not self.heads.replicas() else -1

    # --- ending ---

    async def drain(self, deadline: float) -> None:
        """Take no more, finish or hand back what we hold, bring our gradients into the round; until `deadline`."""
        self.state = PeerState.LEAVING
        self.pipeline.is_accepting = False
        self._on_change()
        await self._until(lambda: not self.pipeline.flights, deadline)
        self.pipeline.hand_back()
        version = self.rounds.version
        if len(self.replicas.members(version)) > 1:
            await self._until(lambda: not self.rounds.slots() or self.rounds.version > version, deadline)

    async def _until(self, is_done: Callable[[], bool], deadline: float) -> None:
        while not is_done() and (left := deadline - monotonic()) > 0:
            await wait_for(self.room, left)

    async def state_chunks(self) -> list[memoryview]:
        """The full state as it is now, for a checkpoint."""
        return await self.compute.run(Urgency.ROUND, self.passes.trainer.state_chunks, CHUNK_BYTES)

    async def stop(self) -> None:
        await self.rounds.stop()
        await self.pipeline.stop()
        await self.ballots.stop()
        await self.switchboard.stop()
        self.compute.stop()
