"""Stage rounds: replicas of a stage agree on a roster, average their gradients and step to the next version.

There is no global step and no fixed leader: of the replicas in a round, the first in an order that changes with the
round proposes the roster. Whoever cannot complete a round asks for the state of who did, or tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import structlog
from torch import Tensor

from node.averaging import AVERAGING_TIMEOUT, Averaging
from node.compute import ComputeThread, Urgency
from node.passes import StagePasses
from node.progress import StageProgress, still_settled
from node.transfer import CHUNK_BYTES, FetchedState, fetch_state
from protocol import wire
from protocol.directory import PeerState
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.links import Answer, Link, Switchboard
from protocol.manifest import Manifest
from protocol.reports import MAX_SLOTS, Progress
from protocol.requests import (
    ROUND_COMMIT,
    ROUND_OPEN,
    ROUND_PART,
    Member,
    RoundCommit,
    RoundHolding,
    RoundOpen,
    RoundPart,
)
from protocol.tasks import wait_for

log = structlog.get_logger("rounds")

_OPEN_TIMEOUT = 5.0
_COMMIT_WAIT = 5.0
_RETRY_AFTER = 0.5
_LEAD_WITHIN = AVERAGING_TIMEOUT + 10.0
"""Seconds that a leader has to close a full round; then it is the next member's turn."""
_PATIENCE = 2.0
"""Seconds for which a stage that lags behind the heads still waits for gradients under way to it."""
_ASTRAY_AFTER = 5.0
_TICK = 0.25
_MAX_ATTEMPTS_AHEAD = 1000


@dataclass(frozen=True)
class _Frozen:
    """What we bring to the round that is being closed. Later gradients belong to the next one."""

    gradient: Tensor
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Standing:
    """A replica's state in a few words: its version and digest, and what has gone into its weights.

    `averaged`: microbatches since the run began; `settled`: those of late rounds whose slots may be asked about.
    """

    version: int
    digest: bytes
    averaged: int
    settled: frozenset[int]


@dataclass(frozen=True)
class _Opened:
    """Whose roster we wait for, in which attempt, since when (monotonic seconds)."""

    leader: PeerId
    attempt: int
    at: float


class StageRounds:
    """The rounds of one stage at one replica. `on_version` is called after every change of weights."""

    def __init__(
        self,
        manifest: Manifest,
        stage: int,
        switchboard: Switchboard,
        compute: ComputeThread,
        passes: StagePasses,
        replicas: StageProgress,
        heads: StageProgress,
        on_version: Callable[[], None],
    ) -> None:
        self._manifest, self._stage, self._switchboard = manifest, stage, switchboard
        self._compute, self._passes = compute, passes
        self._replicas, self._heads, self._on_version = replicas, heads, on_version
        self._own = switchboard.host.peer_id
        self._frozen: _Frozen | None = None
        self._freezing = asyncio.Lock()
        self._opened: _Opened | None = None
        self._closing_since: float | None = None
        self._left_out: set[PeerId] = set()
        self._attempt = 0
        self._committed = asyncio.Event()
        self._averagings: dict[tuple[int, int], Averaging] = {}
        self._running: asyncio.Task[None] | None = None
        self._lagging_since: float | None = None
        self._astray_since: float | None = None
        self._stepped_at = monotonic()
        self.standing = Standing(0, b"\0" * 32, 0, frozenset())
        self._held = self.standing
        self.news = asyncio.Event()
        """Set by whoever learns something that may end a round."""
        switchboard.methods[ROUND_OPEN] = self._on_open
        switchboard.methods[ROUND_COMMIT] = self._on_commit
        switchboard.methods[ROUND_PART] = self._on_part

    @property
    def version(self) -> int:
        return self.standing.version

    @property
    def settled(self) -> frozenset[int]:
        return self.standing.settled

    def held(self) -> Standing:
        """For the compute thread: of the weights as they are there at this moment."""
        return self._held

    @property
    def is_over(self) -> bool:
        """Whether the run has had all its rounds."""
        return self.version >= self._manifest.schedule.rounds

    def slots(self) -> tuple[int, ...]:
        """Slots whose gradients we hold, for this round or already for the next."""
        # In the order in which they move, on the compute thread: what moves now is seen twice, not missed.
        accumulated = tuple(self._passes.slots)
        frozen = self._frozen.slots if self._frozen else ()
        return tuple(dict.fromkeys((*frozen, *accumulated)))

    def progress(self, state: PeerState, in_flight: tuple[int, ...]) -> Progress:
        now = self.standing
        settled = tuple(sorted(now.settled))[-MAX_SLOTS:]
        slots = self.slots()
        return Progress(self._stage, now.version, now.digest, state, slots, in_flight, settled, now.averaged)

    async def start(self) -> None:
        """Stand where the trainer stands: at the run's beginning, or where a checkpoint put it."""
        size = self._manifest.batch.microbatches
        version = self._passes.trainer.version
        self._turn(await self._compute.run(Urgency.ROUND, self._stand, version * size, frozenset()))

    def _stand(self, averaged: int, settled: frozenset[int]) -> Standing:
        """On the compute thread, after every change of the weights."""
        trainer, size = self._passes.trainer, self._manifest.batch.microbatches
        recent = still_settled(settled, trainer.version, size)
        self._held = Standing(trainer.version, trainer.digest(CHUNK_BYTES), averaged, recent)
        self._passes.note_state(self._held.digest)
        return self._held

    async def run(self) -> None:
        """Lead, follow and catch up until cancelled."""
        while True:
            try:
                await self._advance()
            except ProtocolError as error:
                log.warning("round not closed", version=self.version, reason=str(error))
                await asyncio.sleep(_RETRY_AFTER)
            await wait_for(self.news, _TICK)

    async def _advance(self) -> None:
        self._replicas.prune(monotonic())
        self._heads.prune(monotonic())
        if self._running is not None:
            return
        version = self.version
        if self._replicas.newest() > version or self._disagrees(version) or self._is_astray(version):
            await self.resync()
        elif not self.is_over and self._is_due(version) and self._leads(version):
            await self._lead(version)

    def _is_due(self, version: int) -> bool:
        return self._should_close(version) and self._are_all_here(version)

    def _are_all_here(self, version: int) -> bool:
        """Whether nobody is still on the way from the round before to this one: in a moment it will say that it has
        arrived, and who closed the round without it would part from it. But nobody waits for long."""
        late = any(report.version == version - 1 for report in self._replicas.replicas().values())
        return not late or monotonic() - self._stepped_at > _PATIENCE

    def _disagrees(self, version: int) -> bool:
        settled_down = monotonic() - self._stepped_at > _PATIENCE
        agreed = self._replicas.agreed_digest(version)
        return settled_down and agreed is not None and agreed != self.standing.digest

    def _is_astray(self, version: int) -> bool:
        """Whether we went on alone, as after an interruption that parted us from the rest: most of the stage has not
        closed the rounds that we have, and does not hurry after us."""
        if not 0 <= self._replicas.newest() < version - 1:
            self._astray_since = None
            return False
        self._astray_since = self._astray_since or monotonic()
        return monotonic() - self._astray_since > _ASTRAY_AFTER

    def _leads(self, version: int) -> bool:
        """Whether it is ours to lead: the first member's, and if the round does not close, the next one's in turn."""
        self._closing_since = self._closing_since or monotonic()
        turn = int((monotonic() - self._closing_since) / _LEAD_WITHIN)
        members = self._replicas.members(version)
        return bool(members) and members[turn % len(members)] == self._own

    def _should_close(self, version: int) -> bool:
        """The round is full; or the heads are past it, and what was under way to us has had time to arrive."""
        if self._replicas.is_round_full(version):
            return True
        if self._stage == 0:
            return False
        rounds = self._manifest.schedule.rounds
        ahead = 1 if self._manifest.schedule.kind == "synchronous" else 2
        heads = self._heads.newest()
        if heads < min(version + ahead, rounds):
            self._lagging_since = None
            return False
        if heads > version + ahead:
            return True  # What they send by now is not for this round.
        self._lagging_since = self._lagging_since or monotonic()
        return monotonic() - self._lagging_since > _PATIENCE

    # --- leading ---

    async def _lead(self, version: int) -> None:
        """Propose a roster, unless another leader of better rank opens this round, or closes it, meanwhile."""
        self._attempt += 1
        ours = self._opened = _Opened(self._own, self._attempt, monotonic())
        try:
            commit, invited = await self._gather_roster(version, ours.attempt)
            if self._opened is not ours or self._running is not None or self.version != version:
                return
            self._begin(commit)
        finally:
            if self._opened is ours:
                self._opened = None
        await asyncio.gather(*(self._send_commit(peer, commit) for peer in invited), return_exceptions=True)

    async def _gather_roster(self, version: int, attempt: int) -> tuple[RoundCommit, list[PeerId]]:
        """Who brings what to this round, and the members to tell. Raises `ProtocolError` (stale) if it is over."""
        holdings = {self._own: await self._freeze(version)}
        apart = {self._own, *self._left_out}
        others = [peer for peer in self._replicas.members(version) if peer not in apart]
        answers = await asyncio.gather(
            *(self._ask_to_open(peer, version, attempt) for peer in others), return_exceptions=True
        )
        for peer, answer in zip(others, answers, strict=True):
            if isinstance(answer, RoundHolding):
                holdings[peer] = answer
            elif isinstance(answer, ProtocolError):
                if answer.reason is Reason.STALE and await self._is_past(version):
                    raise answer
                if answer.reason is Reason.BUSY and self._may_wait():
                    raise answer  # It follows another leader, perhaps one that we do not know of yet.
                log.warning("round goes on without a replica", version=version, peer=peer, reason=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        roster = tuple(Member(peer, holdings[peer].count) for peer in sorted(holdings))
        settled = {slot for holding in holdings.values() for slot in holding.slots}
        commit = RoundCommit(version, attempt, roster, tuple(sorted(settled)))
        return commit, [peer for peer in holdings if peer != self._own]

    def _may_wait(self) -> bool:
        return self._closing_since is not None and monotonic() - self._closing_since < _PATIENCE

    async def _is_past(self, version: int) -> bool:
        """Whether the stage has closed this round without us, so that we should catch up.

        One member's word is not enough: who did close it announces that to all.
        """
        await asyncio.sleep(2 * _RETRY_AFTER)
        return self._replicas.newest() > version

    async def _ask_to_open(self, peer: PeerId, version: int, attempt: int) -> RoundHolding:
        link = await self._switchboard.connect(peer)
        body, _ = await link.request(ROUND_OPEN, RoundOpen(version, attempt), timeout=_OPEN_TIMEOUT)
        holding = wire.decode(RoundHolding, body)
        if holding.count != len(holding.slots):
            raise ProtocolError(Reason.MALFORMED, f"{holding.count} gradients of {len(holding.slots)} slots")
        return holding

    async def _send_commit(self, peer: PeerId, commit: RoundCommit) -> None:
        link = await self._switchboard.connect(peer)
        await link.request(ROUND_COMMIT, commit, timeout=_OPEN_TIMEOUT)

    async def _freeze(self, version: int) -> RoundHolding:
        """What we bring to this round. At a later attempt, what came in the meantime is brought too."""
        async with self._freezing:
            await self._compute.run(Urgency.ROUND, self._passes.take_gradient, self._keep)
            if self.version != version or self._frozen is None:
                raise ProtocolError(Reason.STALE, f"round {version} at {self.version}")
            return RoundHolding(len(self._frozen.slots), self._frozen.slots)

    def _keep(self, gradient: Tensor, slots: tuple[int, ...]) -> None:
        """On the compute thread."""
        if self._frozen is not None:
            gradient += self._frozen.gradient
            slots = (*self._frozen.slots, *slots)
        self._frozen = _Frozen(gradient, slots)

    # --- following ---

    def _check_member(self, link: Link, version: int) -> None:
        if link.stage != self._stage:
            raise ProtocolError(Reason.WRONG_STAGE, str(link.stage))
        if version != self.version:
            raise ProtocolError(
                Reason.STALE if version < self.version else Reason.TOO_EARLY, f"{version} at {self.version}"
            )

    async def _on_open(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        question = wire.decode(RoundOpen, body)
        self._check_member(link, question.version)
        if self._running is not None:
            raise ProtocolError(Reason.BUSY, "averaging already")
        opened = self._opened
        if opened is not None and opened.leader != link.peer and monotonic() - opened.at < _LEAD_WITHIN:
            # Two leaders, of two views of who lives: the better rank wins, and the other one's round fails.
            members = self._replicas.members(self.version)
            rank = {peer: index for index, peer in enumerate(members)}
            if rank.get(opened.leader, len(rank)) < rank.get(link.peer, len(rank)):
                raise ProtocolError(Reason.BUSY, "another leads")
        elif opened is not None and opened.leader == link.peer and question.attempt <= opened.attempt:
            raise ProtocolError(Reason.REPLAYED, f"attempt {question.attempt}")
        if question.attempt > self._attempt + _MAX_ATTEMPTS_AHEAD:
            # Attempts are counted on from here, and must not run out.
            raise ProtocolError(Reason.TOO_EARLY, f"attempt {question.attempt} after {self._attempt}")
        self._opened = _Opened(link.peer, question.attempt, monotonic())
        self._attempt = max(self._attempt, question.attempt)
        return wire.encode(await self._freeze(question.version)), memoryview(b"")

    async def _on_commit(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        commit = wire.decode(RoundCommit, body)
        self._check_member(link, commit.version)
        opened = self._opened
        if opened is None or (opened.leader, opened.attempt) != (link.peer, commit.attempt) or self._running:
            raise ProtocolError(Reason.UNSOLICITED, "commit")
        own = [member for member in commit.roster if member.peer == self._own]
        if self._frozen is None or own != [Member(self._own, len(self._frozen.slots))]:
            raise ProtocolError(Reason.WRONG_PEER, "roster without what we hold")
        if len({member.peer for member in commit.roster}) != len(commit.roster):
            raise ProtocolError(Reason.MALFORMED, "a member twice in the roster")
        self._begin(commit)
        return b"", memoryview(b"")

    async def _on_part(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        question = wire.decode(RoundPart, body)
        if link.stage != self._stage:
            raise ProtocolError(Reason.WRONG_STAGE, str(link.stage))
        key = (question.version, question.attempt)
        if key not in self._averagings:
            # A member's part may overtake the leader's commit.
            try:
                async with asyncio.timeout(_COMMIT_WAIT):
                    while key not in self._averagings:
                        await self._committed.wait()
                        self._committed.clear()
            except TimeoutError:
                raise ProtocolError(Reason.UNSOLICITED, f"part of round {key}") from None
        return await self._averagings[key].take_part(link, question, payload)

    # --- averaging and stepping ---

    def _begin(self, commit: RoundCommit) -> None:
        assert self._frozen is not None
        averaging = Averaging(
            self._switchboard, commit.version, commit.attempt, commit.roster, self._frozen.gradient
        )
        self._averagings[commit.version, commit.attempt] = averaging
        for key in sorted(self._averagings)[:-2]:
            self._averagings.pop(key).abandon()
        self._committed.set()
        self._running = asyncio.create_task(self._complete(commit, averaging))

    async def _complete(self, commit: RoundCommit, averaging: Averaging) -> None:
        began = monotonic()
        try:
            mean = await averaging.run() if any(member.count for member in commit.roster) else None
            async with asyncio.timeout(AVERAGING_TIMEOUT):
                standing = await self._compute.run(Urgency.ROUND, self._step, mean, commit)
        except (ProtocolError, TimeoutError, ValueError) as error:
            # Those who completed it announce the new version at once; then we take their state. Else we try again.
            averaging.abandon()
            # Were we to lead the next attempt, then without those who failed us in this one.
            self._left_out |= averaging.missing()
            log.warning("averaging failed", version=commit.version, attempt=commit.attempt, reason=str(error))
            await asyncio.sleep(_RETRY_AFTER)
        else:
            log.info(
                "round closed",
                version=standing.version,
                replicas=len(commit.roster),
                microbatches=sum(member.count for member in commit.roster),
                seconds=round(monotonic() - began, 3),
            )
            self._turn(standing)
        finally:
            self._running = None
            self.news.set()

    def _step(self, mean: Tensor | None, commit: RoundCommit) -> Standing:
        """On the compute thread: the optimizer's step, or none for a round without any gradient."""
        if mean is None:
            self._passes.trainer.skip()
        else:
            self._passes.trainer.step(mean)
        if self._manifest.schedule.kind == "synchronous":
            self._passes.take_gradient()  # What came after the round was closed belongs to no round.
        averaged = self._held.averaged + sum(member.count for member in commit.roster)
        return self._stand(averaged, self._held.settled | set(commit.settled))

    def _turn(self, standing: Standing) -> None:
        """A new version began."""
        self.standing = standing
        self._frozen, self._opened, self._attempt = None, None, 0
        self._lagging_since, self._closing_since, self._left_out = None, None, set()
        self._stepped_at = monotonic()
        self._on_version()

    # --- catching up ---

    async def resync(self) -> bool:
        """Take the newest state that replicas of the stage agree on. False if nobody could give it."""
        newest = self._replicas.newest()
        agreed = self._replicas.agreed_digest(newest)
        for peer, report in self._replicas.replicas().items():
            if peer == self._own or report.version != newest or report.digest != agreed:
                continue
            try:
                link = await self._switchboard.connect(peer)
                # The replica may have moved on since it announced; then its own word must do for now, and a
                # state that the majority does not hold is noticed as soon as reports of that version come in.
                fetched = await fetch_state(link, self._passes.trainer.state_bytes())
                standing = await self._compute.run(Urgency.ROUND, self._load, fetched)
            except (ProtocolError, ValueError) as error:
                log.warning("state not taken", peer=peer, reason=str(error))
                continue
            log.info("state taken", peer=peer, version=standing.version)
            self._turn(standing)
            return True
        return False

    def _load(self, fetched: FetchedState) -> Standing:
        self._passes.load_state(fetched.version, fetched.chunks)
        standing = self._stand(fetched.averaged, frozenset(fetched.settled))
        if standing.digest != fetched.digest:
            raise ValueError("the state is not what its digest says")
        return standing

    async def jump(self, version: int) -> None:
        """Count on from the run's version with the weights we have: the stage's own state is lost."""

        def skip() -> Standing:
            while self._passes.trainer.version < version:
                self._passes.trainer.skip()
            return self._stand(version * self._manifest.batch.microbatches, self._held.settled)

        self._turn(await self._compute.run(Urgency.ROUND, skip))

    async def stop(self) -> None:
        for averaging in self._averagings.values():
            averaging.abandon()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
