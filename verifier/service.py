"""The verifier peer: learns what passes, draws panels of it, has them judged, and swears to what it finds.

It serves no stage and no node depends on it for its work. The judging core runs on a thread of its own.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import TypeVar

import structlog

from protocol import wire
from protocol.ballots import Ballots
from protocol.directory import Directory, StageRecord
from protocol.errors import ProtocolError, Reason, UserError
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import Deaf, fetch_manifest
from protocol.invite import Invite
from protocol.links import Link, Switchboard
from protocol.samples import Effort, effort_topic
from protocol.vote_set import VoteSet
from protocol.votes import Cause, Verdict
from verifier.bench import Bench, Opinion, streams_of
from verifier.exhibits import Exhibit, Question, Work, works_of
from verifier.inquirer import ANSWER_WITHIN, Inquirer
from verifier.sampling import Allowance, Journey, Traffic
from verifier.sentinel import Settings
from verifier.streams import Direction, StageIndex
from verifier.tribunal import FEWEST_WITNESSES, PRICE, Finding, hear

log = structlog.get_logger("verifier")

T = TypeVar("T")

LISTEN_EVERY = 1.0
MEET_EVERY = 2.0
JUDGE_EVERY = 0.25
REPORT_EVERY = 1.0
BYTES_SHARE = 0.04
"""Share of the run's bytes that all verifiers together ask for, unless there is a suspicion."""
ALARM_SHARE = 0.02
"""Share of the microbatches that one verifier may look at for alarms and suspicions, beyond what it samples."""
ALARMS_SAVED = 24
RECOMPUTE_SHARE = 0.009
"""Share of the run's compute that all verifiers together may have done again."""
HEARINGS_SAVED = 24.0
"""What may be saved up for hearings, in forward passes of one sequence: several worst cases of a small stage."""
UNREACHABLE_FOR = 20.0
"""Seconds for which a node that takes part may be out of a verifier's reach before that counts as hiding."""
_CALM = 10.0
_NEW = 4
_PULSE, _STALL = 0.5, 3.0


@dataclass(frozen=True)
class VerifierConfig:
    invite: Invite
    identity: Path
    listen: Sequence[str] = DEFAULT_LISTEN


@dataclass
class _Cast:
    """What we last swore of a peer, and when (monotonic and Unix seconds)."""

    verdict: Verdict
    at: float
    expires: int


@dataclass
class _Node:
    """A node that we know of: its link's stage, how far we have listened, and since when it is out of reach."""

    stage: StageIndex
    cursor: int = 0
    lost_at: float | None = None


class Verifier:
    """`start`, then `wait` until something fails. `stop` on every path."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._identity = Identity.load_or_create(config.identity)
        self.peer_id = self._identity.peer_id
        self._generator = random.Random(secrets.randbits(128))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None
        self._host: Host | None = None
        self._switchboard: Switchboard | None = None
        self._nodes: dict[PeerId, _Node] = {}
        self._casts: dict[PeerId, _Cast] = {}
        self._round = 0
        self._stalled_until, self._pulse = 0.0, monotonic()
        self.counts: Counter[str] = Counter()

    # --- joining ---

    async def start(self) -> None:
        """Join the run. Raises `UserError` for what a person can mend: above all, not to be one of its verifiers."""
        config = self._config
        self._failed = asyncio.get_running_loop().create_future()
        self._host = host = await Host.start(config.identity, listen=config.listen, seeds=config.invite.seeds)
        self._spawn(host.watch())
        signed = await fetch_manifest(host, config.invite)
        manifest, electorate = signed.manifest, signed.electorate
        if self.peer_id not in electorate.verifiers:
            raise UserError(
                f"This run's manifest does not name {self.peer_id} as a verifier",
                "Give the key that `init` wrote with --identity, or ask the operator to name this peer",
            )
        self._run, self._manifest = signed.run, manifest
        self._stages = manifest.stages.count
        count = len(electorate.verifiers)
        sequences = manifest.batch.sequences
        self.votes = VoteSet(electorate)
        self.traffic = Traffic(self._stages)
        self.bench = Bench(Settings(alpha=manifest.verification.alpha, recompute=0.0))
        # Every panel shows one sequence of each tensor.
        self._rate = min(manifest.verification.sampling, BYTES_SHARE / count * sequences)
        self._routine = Allowance(2.0 * self._panel_size, float(self._panel_size))
        self._alarms = Allowance(ALARMS_SAVED, ALARMS_SAVED)
        self._hearings = Allowance(HEARINGS_SAVED, HEARINGS_SAVED)
        self._hearing_rate = RECOMPUTE_SHARE / count * sequences * self._stages * PRICE[Direction.GRADIENT]
        self._directory = await Directory.join(host, signed.run, self._stages)
        self._switchboard = Switchboard(host, signed.run, stage=-1, max_tensor=0, owner=Deaf())
        self._switchboard.obey(self.votes)
        self._ballots = Ballots(
            self._switchboard,
            self.votes,
            seeds=config.invite.seeds,
            path=config.identity.with_name(f"{config.identity.stem}-{signed.run.hex()[:16]}.votes"),
        )
        await self._switchboard.start()
        await self._ballots.start()
        await self._ballots.catch_up()
        self._spawn(self._ballots.run())
        self._remember_casts()
        self._inquirer = Inquirer(self._switchboard, manifest)
        self._spawn(self._watch_ourselves())
        self._every(MEET_EVERY, self._meet)
        self._every(LISTEN_EVERY, self._listen)
        self._every(JUDGE_EVERY, self._judge)
        self._every(REPORT_EVERY, self._report)
        log.info("verifying", peer=self.peer_id, verifiers=count, quorum=electorate.quorum)

    @property
    def _panel_size(self) -> int:
        """Microbatches of a panel: one a replica where they are spread evenly, and one to spare."""
        by_stage = Counter(node.stage for node in self._nodes.values())
        return max(by_stage.values(), default=2) + 1

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)

    def _every(self, seconds: float, action: Callable[[], Awaitable[None]]) -> None:
        async def repeat() -> None:
            while True:
                try:
                    await action()
                except (ProtocolError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                    log.warning("will be tried again", action=action.__name__, reason=str(error))
                await asyncio.sleep(seconds)

        self._spawn(repeat())

    async def _watch_ourselves(self) -> None:
        """Where we ourselves were stopped, that others did not answer in time says nothing about them."""
        self._pulse = monotonic()
        while True:
            await asyncio.sleep(_PULSE)
            now = monotonic()
            if now - self._pulse > _STALL:
                self._stalled_until = now + 2 * ANSWER_WITHIN
            self._pulse = now

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

    # --- learning what passes ---

    @property
    def _links(self) -> dict[PeerId, Link]:
        assert self._switchboard is not None
        return {
            peer: link for peer, link in self._switchboard.links.items() if link.is_up and link.stage >= 0
        }

    async def _meet(self) -> None:
        """Keep a link to every node, and remember who is out of reach since when."""
        links, now = self._links, monotonic()
        found = await asyncio.gather(*(self._directory.peers(stage) for stage in range(self._stages)))
        records = {peer: record for stage in found for peer, record in stage.items()}
        for peer in [peer for peer in self._nodes if peer not in records and peer not in links]:
            del self._nodes[peer]
        for peer, record in records.items():
            if self.votes.is_banned(peer) or peer == self.peer_id:
                self._nodes.pop(peer, None)
                continue
            node = self._nodes.setdefault(peer, _Node(record.stage, lost_at=now))
            if peer in links:
                node.lost_at = None
            else:
                node.lost_at, node.cursor = node.lost_at or now, 0
                self._spawn(self._connect(peer, record))

    async def _connect(self, peer: PeerId, record: StageRecord) -> None:
        assert self._switchboard is not None
        with suppress(ProtocolError):
            await self._switchboard.connect(peer, record.addresses)

    async def _listen(self) -> None:
        before = self.traffic.finished
        await asyncio.gather(*(self._listen_to(peer, link) for peer, link in self._links.items()))
        new = self.traffic.finished - before
        self._routine.limit = 2.0 * self._panel_size
        self._routine.earn(self._rate * new)
        self._alarms.earn(ALARM_SHARE * new)
        self._hearings.earn(self._hearing_rate * new)

    async def _listen_to(self, peer: PeerId, link: Link) -> None:
        node = self._nodes.setdefault(peer, _Node(link.stage))
        node.stage = link.stage
        try:
            listed = await self._inquirer.list_passages(link, node.cursor)
        except ProtocolError as error:
            self._hold_against(peer, "does not say what passed through it", error)
            return
        node.cursor = listed.serial
        for passage in listed.passages:
            self.traffic.note(peer, link.stage, passage, monotonic())

    def _hold_against(self, peer: PeerId, problem: str, error: ProtocolError) -> None:
        """A failure counts unless it may be the network's or ours: who hangs or is gone loses its link."""
        node = self._nodes.get(peer)
        if error.reason is Reason.UNREACHABLE:
            lost_at = node.lost_at if node is not None else None
            if lost_at is None or monotonic() - lost_at < UNREACHABLE_FOR:
                return
        if self._stalled_until > monotonic() or monotonic() - self._pulse > _STALL:
            return
        log.info("not shown", peer=peer, problem=problem, reason=error.reason.value)
        own_doing = error.reason not in (Reason.TIMED_OUT, Reason.UNREACHABLE, Reason.EXPIRED, Reason.BUSY)
        cause = Cause.RECEIPTS if own_doing and error.reason is not Reason.WRONG_PEER else Cause.WITHHELD
        self.bench.conduct.fail(peer, f"{problem} ({error.reason.value})", cause)

    # --- drawing panels ---

    async def _judge(self) -> None:
        """At most one panel at a time: an alarm's first, then one for suspicions, then a routine one."""
        now = monotonic()
        self.votes.advance(time())
        accused = self._accused()
        size = self._panel_size
        draw = partial(self.traffic.draw, self._generator, now, most=size)
        panel: list[Journey] = []
        alarms = self.traffic.alarms(now)
        if alarms and self._alarms.can_pay(size):
            panel = draw(start=self._generator.choice(alarms), wanted=accused)
            self._alarms.pay(len(panel))
            self.counts["alarms"] += 1
        elif accused and self._alarms.can_pay(size):
            panel = draw(wanted=accused)
            self._alarms.pay(len(panel))
        elif self._routine.can_pay(size):
            panel = draw(wanted=self._newcomers())
            self._routine.pay(len(panel))
        if panel:
            await self._examine(panel, accused)

    def _accused(self) -> set[PeerId]:
        """Whom we suspect ourselves, or another verifier holds something against, and who is not banned yet."""
        suspected = {peer for peer, cast in self._casts.items() if cast.verdict is not Verdict.OK}
        for peer in self.votes.subjects():
            votes = self.votes.votes_on(peer, time()).values()
            if any(one.vote.verdict is not Verdict.OK for one in votes):
                suspected.add(peer)
        final = {peer for peer, cast in self._casts.items() if cast.verdict is Verdict.BANNED}
        return {peer for peer in suspected - final if not self.votes.is_banned(peer)}

    def _newcomers(self) -> set[PeerId]:
        return {peer for peer in self._nodes if self.bench.opinion(peer).samples < _NEW}

    # --- judging a panel ---

    async def _examine(self, panel: Sequence[Journey], accused: set[PeerId]) -> None:
        self._round += 1
        self.counts["sampled"] += len(panel)
        works: list[Work] = []
        for found in await asyncio.gather(*(self._look_at(journey) for journey in panel)):
            works += found
        works = [work for work in works if not self.votes.is_banned(work.peer)]
        flagged = {peer for journey in panel for peer in journey.flagged.values()}
        for (stage, _), group in streams_of(works):
            replicas = self._replicas(stage)
            screening = await self._in_thread(self.bench.screen, group, self._round, len(replicas))
            findings: dict[int, Finding] = {}
            for place in self.bench.worth_hearing(screening, group, accused | flagged):
                if (finding := await self._hear(group[place], replicas)) is not None:
                    findings[place] = finding
            spare = self._routine_hearing(group, findings)
            if spare is not None and (finding := await self._hear(group[spare], replicas)) is not None:
                findings[spare] = finding
            await self._in_thread(self.bench.record, screening, group, findings)
        for peer in {work.peer for work in works} | set(self._casts) | set(self._nodes):
            await self._review(peer)

    async def _look_at(self, journey: Journey) -> list[Work]:
        """What the nodes on a microbatch's way show of it, as far as it hangs together."""
        sequence = self._generator.randrange(self._manifest.batch.sequences)
        questions = [
            Question(self._run, peer, stage, journey.microbatch, direction, sequence)
            for stage, peer in journey.path.items()
            for direction in Direction
            if (stage > 0 if direction is Direction.ACTIVATION else stage < self._stages - 1)
            and not self.votes.is_banned(peer)
        ]
        answers = await asyncio.gather(
            *(self._inquirer.show(one) for one in questions), return_exceptions=True
        )
        shown: dict[tuple[StageIndex, Direction], Exhibit] = {}
        failures: dict[tuple[StageIndex, Direction], tuple[PeerId, ProtocolError]] = {}
        for question, answer in zip(questions, answers, strict=True):
            key = question.stage, question.direction
            if isinstance(answer, Exhibit):
                shown[key] = answer
            elif isinstance(answer, ProtocolError):
                failures[key] = question.holder, answer
            elif isinstance(answer, BaseException):
                raise answer
        self._hold_to_account(shown, failures)
        works, exposures = works_of(shown, self._stages, sequence, journey.states)
        for exposure in exposures:
            log.info("exposed", peer=exposure.peer, stage=exposure.stage, problem=exposure.problem)
            self.bench.conduct.fail(exposure.peer, exposure.problem, Cause.RECEIPTS)
        for work in works:
            self.bench.conduct.please(work.peer)
        return works

    def _hold_to_account(
        self,
        shown: dict[tuple[StageIndex, Direction], Exhibit],
        failures: dict[tuple[StageIndex, Direction], tuple[PeerId, ProtocolError]],
    ) -> None:
        """Whose output was shown by its receiver must have had what it was made of."""
        owing: set[tuple[StageIndex, Direction]] = set()
        for exhibit in shown.values():
            owing.add((exhibit.receipt.stage, Direction.ACTIVATION))
            if exhibit.receipt.direction is Direction.GRADIENT:
                owing.add((exhibit.receipt.stage, Direction.GRADIENT))
        for key, (peer, error) in failures.items():
            if key in owing or error.reason in (Reason.WRONG_DIGEST, Reason.MALFORMED, Reason.BAD_SIGNATURE):
                self._hold_against(peer, f"does not show the {key[1]} that it was sent", error)

    # --- hearings ---

    def _replicas(self, stage: StageIndex) -> list[PeerId]:
        """Those of a stage that we can ask, and that nothing grave is held against."""
        return [
            peer
            for peer, link in self._links.items()
            if link.stage == stage and not self.votes.is_banned(peer)
        ]

    async def _hear(self, work: Work, replicas: Sequence[PeerId]) -> Finding | None:
        witnesses = [peer for peer in replicas if peer != work.peer]
        price = PRICE[work.direction]
        worst = price * max(FEWEST_WITNESSES, len(witnesses) // 2 + 1)
        if not witnesses or not self._hearings.can_pay(worst):
            return None
        finding = await hear(work, witnesses, self._inquirer.redo, self._generator)
        self._hearings.pay(finding.asked * price)
        self.counts["hearings"] += 1
        if finding.guilty:
            log.warning(
                "found against", peer=work.peer, stage=work.stage, direction=work.direction.value,
                version=work.receipt.version, difference=round(finding.difference, 3),
            )  # fmt: skip
        return finding

    def _routine_hearing(self, group: Sequence[Work], heard: dict[int, Finding]) -> int | None:
        """What is saved beyond the worst cases is spent on anybody, so that nobody can feel safe."""
        rest = [place for place in range(len(group)) if place not in heard]
        if not rest or self._hearings.saved < HEARINGS_SAVED * 3 / 4:
            return None
        return self._generator.choice(rest)

    # --- swearing ---

    async def _review(self, peer: PeerId) -> None:
        """Say what we hold of a peer, if that has changed or what we said expires."""
        opinion, last, now = self.bench.opinion(peer), self._casts.get(peer), monotonic()
        said = last.verdict if last is not None else Verdict.OK
        if said is Verdict.BANNED and opinion.verdict is not Verdict.BANNED:
            return
        is_due = last is not None and said is not Verdict.OK and last.expires - time() < self._term / 2
        has_fallen = opinion.verdict.rank < said.rank
        if opinion.verdict is said and not is_due:
            return
        if has_fallen and last is not None and now - last.at < _CALM:
            return
        await self._cast(peer, opinion)

    @property
    def _term(self) -> int:
        return self._manifest.verification.term

    def _remember_casts(self) -> None:
        """What we swore before we were started again still stands."""
        for subject in self.votes.subjects():
            own = self.votes.votes_on(subject, time()).get(self.peer_id)
            if own is not None:
                self._casts[subject] = _Cast(own.vote.verdict, monotonic(), own.vote.expires)

    async def _cast(self, peer: PeerId, opinion: Opinion) -> None:
        node = self._nodes.get(peer)
        signed = self.votes.cast(
            self._identity,
            peer,
            opinion.verdict,
            opinion.cause,
            time(),
            stage=node.stage if node is not None else 0,
            evidence=opinion.evidence,
            samples=opinion.samples,
            flags=sum(opinion.flags.values()),
            text=opinion.text,
        )
        self._casts[peer] = _Cast(opinion.verdict, monotonic(), signed.vote.expires)
        await self._ballots.publish(signed)
        log.info("voted", subject=peer, verdict=opinion.verdict.value, text=opinion.text)

    async def _report(self) -> None:
        assert self._host is not None
        await self._host.publish(effort_topic(self._run), wire.encode(self.effort()))

    def effort(self) -> Effort:
        """What we have done so far."""
        assert self._switchboard is not None
        return Effort(
            passed=self.traffic.finished,
            sampled=self.counts["sampled"],
            alarms=self.counts["alarms"],
            hearings=self.counts["hearings"],
            bytes=sum(
                stream.sent_bytes + stream.received_bytes
                for link in self._switchboard.links.values()
                for stream in link.streams
            ),
        )

    # --- ending ---

    async def wait(self) -> None:
        """For ever, or until a task fails: raises its error."""
        assert self._failed is not None
        await asyncio.shield(self._failed)

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failed is not None:
            self._failed.cancel()
        if self._switchboard is not None:
            await self._ballots.stop()
            await self._switchboard.stop()
        if self._host is not None:
            await self._host.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)
