"""Drawing panels, having what is shown of them judged, and holding to account who does not show it.

Speaks to nodes through the inquirer; the judging core runs on a thread of its own. What follows from it is
`verifier.bench.Bench.opinion`, and another's to say.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic
from typing import TypeVar

import structlog

from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.manifest import Manifest
from protocol.votes import Cause
from verifier.bench import Bench, Opinion, streams_of
from verifier.exhibits import Exhibit, Question, Work, works_of
from verifier.inquirer import ANSWER_WITHIN, Inquirer
from verifier.sampling import Allowance, Journey, Traffic
from verifier.sentinel import Settings
from verifier.streams import Direction, StageIndex
from verifier.tribunal import PRICE, Finding, hear, worst_price

log = structlog.get_logger("verifier")

T = TypeVar("T")
_Place = tuple[StageIndex, Direction]

BYTES_SHARE = 0.04
"""Share of the run's bytes that all verifiers together ask for, unless there is a suspicion."""
ALARM_SHARE = 0.02
"""Share of the microbatches that one verifier may look at for alarms and suspicions, beyond what it samples."""
ALARMS_SAVED = 6
"""Panels that may be saved up for alarms and suspicions."""
RECOMPUTE_SHARE = 0.002
"""Share of the run's compute that all verifiers together may have done again. By sequences: one alone costs a small
stage up to twice its share of a microbatch."""
HEARINGS_SAVED = 4
"""What may be saved up for hearings, in worst cases: of a gradient, in the stage that has most replicas."""
_FOR_ANYBODY, _FOR_SUSPECTS = 3 / 4, 1 / 2
"""Of that: above the one it is spent on anybody; and the other is left by hearings of what is merely odd. A panel's
works are looked at in the order in which they travel, and in a long pipeline they would use up everything before it is
a suspect's turn."""
UNREACHABLE_FOR = 20.0
"""Seconds for which a node that takes part may be out of a verifier's reach before that counts as hiding."""
PURSUE_EVERY = 1.5
"""Seconds between two panels for the same suspicions: they would show the same again."""
_FEW = 4
"""Samples of a peer below which it is new."""
_ACCUSED, _NEWCOMER = 2.0, 0.5
"""What it is worth to have one in a panel, in replicas more."""
_PULSE, _STALL = 1.0, 3.0
_ITS_OWN_DOING = frozenset(
    {
        Reason.FOREIGN_RUN,
        Reason.UNSOLICITED,
        Reason.WRONG_PEER,
        Reason.WRONG_STAGE,
        Reason.BAD_SIGNATURE,
        Reason.WRONG_DIGEST,
        Reason.MALFORMED,
    }
)
"""What no network does to an answer: its receipt or its tensor is not what was signed."""


class Judge:
    """Of one verifier. `replicas` gives the nodes of a stage that can be asked, `is_banned` what all know of a peer."""

    def __init__(
        self,
        run: bytes,
        manifest: Manifest,
        inquirer: Inquirer,
        replicas: Callable[[StageIndex], list[PeerId]],
        is_banned: Callable[[PeerId], bool],
    ) -> None:
        policy, sequences = manifest.verification, manifest.batch.sequences
        count = len(policy.verifiers)
        self._run, self._inquirer = run, inquirer
        self._stages, self._sequences = manifest.stages.count, sequences
        self._replicas, self._is_banned = replicas, is_banned
        self._generator = random.Random(secrets.randbits(128))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self.traffic = Traffic(self._stages)
        # Hearings are paid for here, not by the core.
        self.bench = Bench(Settings(alpha=policy.alpha, recompute=0.0))
        # Every panel shows one sequence of each tensor.
        self._rate = min(policy.sampling, BYTES_SHARE / count * sequences)
        self._hearing_rate = RECOMPUTE_SHARE / count * sequences * self._stages * PRICE[Direction.GRADIENT]
        self._routine, self._alarms, self._hearings = (Allowance(0.0, 0.0) for _ in range(3))
        self._set_limits()
        self._alarms.saved = self._alarms.limit
        self._hearings.saved = _FOR_ANYBODY * self._hearings.limit
        self._rounds = itertools.count(1)
        self._pursued_at = -PURSUE_EVERY
        self._held_lost: dict[PeerId, float] = {}
        self._stalled_until, self._pulse = 0.0, monotonic()
        self.counts: Counter[str] = Counter()
        self.news = asyncio.Event()
        """Set when opinions may have changed."""

    @property
    def _most_replicas(self) -> int:
        """Of a stage."""
        return max(len(self._replicas(stage)) for stage in range(self._stages))

    @property
    def _panel_size(self) -> int:
        """Microbatches of a panel: one a replica where they are spread evenly, and one to spare."""
        return max(2, self._most_replicas) + 1

    def _set_limits(self) -> None:
        size = float(self._panel_size)
        self._routine.limit, self._alarms.limit = 2 * size, ALARMS_SAVED * size
        self._hearings.limit = HEARINGS_SAVED * worst_price(Direction.GRADIENT, self._most_replicas - 1)

    def earn(self, microbatches: int) -> None:
        """So many more have passed: that much more may be looked at."""
        self._set_limits()
        self._routine.earn(self._rate * microbatches)
        self._alarms.earn(ALARM_SHARE * microbatches)
        self._hearings.earn(self._hearing_rate * microbatches)

    async def watch_ourselves(self) -> None:
        """Until cancelled. Where we ourselves were stopped, that others did not answer says nothing about them."""
        self._pulse = monotonic()
        while True:
            await asyncio.sleep(_PULSE)
            now = monotonic()
            if now - self._pulse > _STALL:
                self._stalled_until = now + 2 * ANSWER_WITHIN
            self._pulse = now

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

    # --- drawing ---

    async def opinions(self, peers: Collection[PeerId]) -> dict[PeerId, Opinion]:
        return await self._in_thread(self._opinions, tuple(peers), monotonic())

    def _opinions(self, peers: Sequence[PeerId], now: float) -> dict[PeerId, Opinion]:
        return {peer: self.bench.opinion(peer, now) for peer in peers}

    async def sit(self, accused: Collection[PeerId], known: Collection[PeerId]) -> set[PeerId]:
        """At most one panel: an alarm's first, then one for the accused, then a routine one. Who was looked at.

        `known` are all nodes: the newest among them come first in a routine panel.
        """
        new: set[PeerId] = set()
        if self._routine.can_pay(self._panel_size):
            new = {peer for peer, one in (await self.opinions(known)).items() if one.samples < _FEW}
        panel, is_routine = self._draw(accused, new)
        if not panel:
            return set()
        self.counts["sampled"] += len(panel)
        return await self._examine(panel, accused, is_routine)

    def _draw(self, accused: Collection[PeerId], new: Collection[PeerId]) -> tuple[list[Journey], bool]:
        """A panel, and whether it is a routine one."""
        now, size = monotonic(), self._panel_size
        draw = partial(self.traffic.draw, self._generator, now, most=size)
        is_routine = False
        alarm, pursued = self.traffic.draw_alarm(self._generator, now), dict.fromkeys(accused, _ACCUSED)
        if alarm is not None and self._alarms.can_pay(size):
            panel = draw(start=alarm, wanted=pursued)
            self.counts["alarms"] += 1
            self._alarms.pay(len(panel))
        elif accused and self._alarms.can_pay(size) and now - self._pursued_at >= PURSUE_EVERY:
            self._pursued_at = now
            panel = draw(wanted=pursued)
            self._alarms.pay(len(panel))
        elif self._routine.can_pay(size):
            is_routine = True
            panel = draw(wanted=dict.fromkeys(new, _NEWCOMER))
            self._routine.pay(len(panel))
        else:
            panel = []
        return panel, is_routine

    # --- judging ---

    async def _examine(
        self, panel: Sequence[Journey], accused: Collection[PeerId], is_routine: bool
    ) -> set[PeerId]:
        questions = [(journey, self._questions(journey)) for journey in panel]
        answers = await self._ask([one for _, some in questions for one in some])
        # Another panel's may begin before this one's is over, where somebody has to be waited for.
        round_ = next(self._rounds)
        found = [self._look_at(journey, some, answers) for journey, some in questions]
        works = [work for some in found for work in some if not self._is_banned(work.peer)]
        for (stage, direction), group in streams_of(works):
            # Only in the direction that was flagged: hearings that acquit would spend what is saved for the others.
            flagged = [one for one in panel if any(way is direction for _, way in one.flagged)]
            suspects = {*accused, *(peer for journey in flagged for peer in journey.blamed(self._stages))}
            replicas = self._replicas(stage)
            screening = await self._in_thread(self.bench.screen, group, round_, len(replicas))
            odd = {journey.microbatch for journey in flagged}
            places = self.bench.worth_hearing(screening, group, suspects, odd)
            if is_routine:
                places += self._routine_hearing(group, places)
            heard = await asyncio.gather(
                *(self._hear(group[place], replicas, group[place].peer in suspects) for place in places)
            )
            findings = {
                place: finding for place, finding in zip(places, heard, strict=True) if finding is not None
            }
            await self._in_thread(self.bench.record, screening, group, findings, monotonic())
            self.news.set()
        return {work.peer for work in works}

    def _questions(self, journey: Journey) -> list[Question]:
        """What the nodes on a microbatch's way were sent of it, of the same sequence all."""
        sequence = self._generator.randrange(self._sequences)
        return [
            Question(self._run, peer, stage, journey.microbatch, direction, sequence)
            for stage, peer in journey.path.items()
            for direction in Direction
            if (stage > 0 if direction is Direction.ACTIVATION else stage < self._stages - 1)
            and not self._is_banned(peer)
        ]

    async def _ask(self, questions: Sequence[Question]) -> dict[Question, Exhibit | ProtocolError]:
        """All that one node is asked it is asked at once: to be woken costs it more than to answer."""
        asked: dict[PeerId, list[Question]] = {}
        for question in questions:
            asked.setdefault(question.holder, []).append(question)
        answers = await asyncio.gather(*(self._inquirer.show(*one) for one in asked.items()))
        return {
            question: answer
            for some, shown in zip(asked.values(), answers, strict=True)
            for question, answer in zip(some, shown, strict=True)
        }

    def _look_at(
        self,
        journey: Journey,
        questions: Sequence[Question],
        answers: Mapping[Question, Exhibit | ProtocolError],
    ) -> list[Work]:
        """What the nodes on a microbatch's way show of it, as far as it hangs together."""
        if not questions:
            return []  # All of them are banned.
        shown: dict[_Place, Exhibit] = {}
        failures: dict[_Place, tuple[PeerId, ProtocolError]] = {}
        for question in questions:
            key, answer = (question.stage, question.direction), answers[question]
            if isinstance(answer, Exhibit):
                shown[key] = answer
            else:
                failures[key] = question.holder, answer
        self._hold_to_account(shown, failures)
        works, exposures = works_of(shown, self._stages, questions[0].sequence, journey.states)
        for exposure in exposures:
            log.info("exposed", peer=exposure.peer, stage=exposure.stage, problem=exposure.problem)
            self.bench.conduct.fail(exposure.peer, exposure.problem, Cause.RECEIPTS)
            self.news.set()
        for work in works:
            self.bench.conduct.please(work.peer)
        return works

    def _hold_to_account(
        self,
        shown: Mapping[_Place, Exhibit],
        failures: Mapping[_Place, tuple[PeerId, ProtocolError]],
    ) -> None:
        """Whose output was shown by its receiver must have had what it was made of."""
        owing: set[_Place] = set()
        for exhibit in shown.values():
            owing.add((exhibit.receipt.stage, Direction.ACTIVATION))
            if exhibit.receipt.direction is Direction.GRADIENT:
                owing.add((exhibit.receipt.stage, Direction.GRADIENT))
        for key, (peer, error) in failures.items():
            if key in owing or error.reason in _ITS_OWN_DOING:
                self.hold_against(peer, f"does not show the {key[1]} that it was sent", error)

    def note_lost(self, peer: PeerId, seconds: float) -> None:
        """There has been no link to the peer for so long. Who all the while takes part hides from us."""
        if seconds < UNREACHABLE_FOR or not self.traffic.has_seen(peer, monotonic() - UNREACHABLE_FOR / 2):
            return
        if monotonic() - self._held_lost.get(peer, -UNREACHABLE_FOR) > UNREACHABLE_FOR:
            self._held_lost[peer] = monotonic()
            self.bench.conduct.fail(peer, "takes part, but is out of verifiers' reach")

    def hold_against(self, peer: PeerId, problem: str, error: ProtocolError) -> None:
        """A failure counts unless it may be the network's or ours: who hangs or is gone loses its link."""
        if error.reason is Reason.UNREACHABLE:
            return
        if self._stalled_until > monotonic() or monotonic() - self._pulse > _STALL:
            return
        log.info("not shown", peer=peer, problem=problem, reason=error.reason.value)
        cause = Cause.RECEIPTS if error.reason in _ITS_OWN_DOING else Cause.WITHHELD
        self.bench.conduct.fail(peer, f"{problem} ({error.reason.value})", cause)
        self.news.set()

    # --- hearings ---

    async def _hear(self, work: Work, replicas: Sequence[PeerId], is_suspect: bool) -> Finding | None:
        witnesses = [peer for peer in replicas if peer != work.peer]
        worst = worst_price(work.direction, len(witnesses))
        kept = 0.0 if is_suspect else _FOR_SUSPECTS * self._hearings.limit
        if not witnesses or not self._hearings.can_pay(worst + kept):
            return None
        self._hearings.pay(worst)
        finding = await hear(work, witnesses, self._inquirer.redo, self._generator)
        self._hearings.earn(worst - finding.asked * PRICE[work.direction])
        self.counts["hearings"] += 1
        if finding.guilty:
            log.warning(
                "found against", peer=work.peer, stage=work.stage, direction=work.direction.value,
                version=work.receipt.version, difference=round(finding.difference, 3),
            )  # fmt: skip
        return finding

    def _routine_hearing(self, group: Sequence[Work], heard: Collection[int]) -> list[int]:
        """What is saved beyond the worst cases is spent on anybody, so that nobody can feel safe."""
        rest = [place for place in range(len(group)) if place not in heard]
        if not rest or self._hearings.saved < _FOR_ANYBODY * self._hearings.limit:
            return []
        return [self._generator.choice(rest)]
