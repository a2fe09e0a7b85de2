"""A verifier's judge among nodes that do not show what they were sent, or show something else. No network."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import cast

import pytest

from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId
from protocol.manifest import VerificationSection
from protocol.receipts import MicrobatchId
from protocol.samples import Passage
from protocol.votes import Cause, Verdict
from tests.swarms import small_manifest
from tests.verifier.exhibits import RUN, STAGES, Trip
from verifier.exhibits import Exhibit, Question, Work, works_of
from verifier.inquirer import Inquirer
from verifier.judge import Judge
from verifier.streams import Direction
from verifier.tribunal import Answer, Finding


@dataclass
class Nodes:
    """One node a stage. `refuser` answers no question but with `reason`."""

    people: list[Identity] = field(default_factory=lambda: [Identity.generate() for _ in range(STAGES)])
    refuser: PeerId | None = None
    reason: Reason = Reason.BUSY
    trips: dict[MicrobatchId, Trip] = field(default_factory=dict)

    @property
    def peers(self) -> list[PeerId]:
        return [one.peer_id for one in self.people]

    async def show(self, holder: PeerId, questions: Sequence[Question]) -> list[Exhibit | ProtocolError]:
        if holder == self.refuser:
            return [ProtocolError(self.reason) for _ in questions]
        return [self.trips[one.microbatch].show(one.stage, one.direction, one.sequence) for one in questions]

    async def redo(self, witness: PeerId, work: Work) -> Answer:
        raise ProtocolError(Reason.EXPIRED, witness)

    def work(self, judge: Judge, slots: range) -> None:
        """Microbatches pass, and every node says so."""
        for slot in slots:
            trip = Trip(self.people, slot=slot)
            self.trips[trip.microbatch] = trip
            for stage, peer in enumerate(self.peers):
                before = self.peers[stage - 1] if stage else None
                after = self.peers[stage + 1] if stage + 1 < STAGES else None
                now, passage = monotonic(), Passage(trip.microbatch, before, after, 3, None, b"weights!")
                judge.traffic.take(peer, stage, [passage], now, now)
        judge.earn(1000)


def judge_of(nodes: Nodes) -> Judge:
    """Without hearings: nobody else could do work of these nodes again."""
    verification = VerificationSection(verifiers=(Identity.generate().peer_id,), quorum=1)
    manifest = small_manifest(stages=STAGES, verification=verification)
    return Judge(
        RUN, manifest, cast(Inquirer, nodes), lambda stage: nodes.peers[stage : stage + 1], lambda peer: False
    )


async def sit(judge: Judge, nodes: Nodes, panels: int) -> list[Verdict]:
    """What is thought of the refuser after each panel."""
    verdicts = []
    for panel in range(panels):
        nodes.work(judge, range(10 * panel, 10 * panel + 10))
        seen = await judge.sit(set(), nodes.peers)
        assert seen or nodes.refuser is not None, "nobody was looked at"
        opinions = await judge.opinions(nodes.peers)
        assert all(one.verdict is Verdict.OK for peer, one in opinions.items() if peer != nodes.refuser), (
            "neighbours of who hides are blamed"
        )
        verdicts.append(opinions[nodes.refuser or nodes.peers[1]].verdict)
    return verdicts


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        pytest.param(Reason.BUSY, Cause.WITHHELD, id="it refuses"),
        pytest.param(Reason.TIMED_OUT, Cause.WITHHELD, id="it stalls"),
        pytest.param(Reason.WRONG_DIGEST, Cause.RECEIPTS, id="it shows what its neighbour never made"),
        pytest.param(Reason.BAD_SIGNATURE, Cause.RECEIPTS, id="it shows a receipt that nobody signed"),
    ],
)
async def test_who_does_not_show_is_suspected_then_quarantined_and_never_banned(
    reason: Reason, cause: Cause
) -> None:
    nodes = Nodes(reason=reason)
    nodes.refuser = nodes.peers[1]
    judge = judge_of(nodes)
    verdicts = await sit(judge, nodes, 8)
    opinion = (await judge.opinions([nodes.refuser]))[nodes.refuser]
    judge.stop()
    assert verdicts[0] in (Verdict.SUSPECT, Verdict.QUARANTINED)
    assert verdicts[-1] is Verdict.QUARANTINED and Verdict.BANNED not in verdicts
    assert opinion.cause is cause and reason.value in opinion.text


async def test_who_shows_everything_and_who_is_gone_are_left_alone() -> None:
    nodes = Nodes()
    judge = judge_of(nodes)
    assert set(await sit(judge, nodes, 4)) == {Verdict.OK}
    nodes.refuser, nodes.reason = nodes.peers[1], Reason.UNREACHABLE
    assert set(await sit(judge, nodes, 4)) == {Verdict.OK}
    judge.stop()


async def test_who_was_stopped_itself_blames_nobody_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(reason=Reason.TIMED_OUT)
    nodes.refuser = nodes.peers[1]
    judge = judge_of(nodes)
    monkeypatch.setattr(judge, "_pulse", monotonic() - 60.0)  # As after a SIGSTOP.
    assert set(await sit(judge, nodes, 4)) == {Verdict.OK}
    judge.stop()


async def test_that_something_was_not_shown_is_news() -> None:
    """So that a vote need not wait for the next review."""
    nodes = Nodes()
    nodes.refuser = nodes.peers[1]
    judge = judge_of(nodes)
    nodes.work(judge, range(10))
    sitting = asyncio.create_task(judge.sit(set(), nodes.peers))
    async with asyncio.timeout(10):
        await judge.news.wait()
    await sitting
    judge.stop()


@pytest.mark.parametrize("flagged", Direction)
async def test_who_sent_what_was_flagged_is_heard_on_that_and_not_on_the_other_direction(
    flagged: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes()
    judge, heard = judge_of(nodes), []

    async def hear(work: Work, replicas: Sequence[PeerId], is_suspect: bool) -> None:
        heard.append((work.peer, work.direction))

    monkeypatch.setattr(judge, "_hear", hear)
    monkeypatch.setattr(judge, "_routine_hearing", lambda group, heard: [])
    nodes.work(judge, range(5))
    receiver = 2 if flagged is Direction.ACTIVATION else 0
    for trip in nodes.trips.values():
        passage = Passage(trip.microbatch, nodes.peers[1], nodes.peers[1], 3, flagged, b"weights!")
        judge.traffic.take(nodes.peers[receiver], receiver, [passage], monotonic(), monotonic())
    await judge.sit(set(), nodes.peers)
    assert {direction for peer, direction in heard if peer == nodes.peers[1]} == {flagged}


def a_work(direction: Direction) -> Work:
    """Of an inner stage."""
    trip = Trip(Nodes().people)
    works, _ = works_of(trip.show_all(), STAGES, 0, {})
    return next(work for work in works if work.stage == 1 and work.direction is direction)


def with_replicas(judge: Judge, count: int) -> list[PeerId]:
    """As many in every stage."""
    replicas = [Identity.generate().peer_id for _ in range(count)]
    judge._replicas = lambda stage: replicas
    return replicas


async def undecided(*_: object) -> Finding:
    return Finding(None, asked=2)


async def test_what_is_merely_odd_leaves_enough_for_the_hearings_of_suspects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A panel is looked at from the head on: in a long pipeline a suspect's turn comes late."""
    monkeypatch.setattr("verifier.judge.hear", undecided)
    judge, work = judge_of(Nodes()), a_work(Direction.GRADIENT)
    replicas = with_replicas(judge, 3)
    merely_odd = [await judge._hear(work, replicas, False) for _ in range(20)]
    suspect = [await judge._hear(work, replicas, True) for _ in range(3)]
    judge.stop()
    assert merely_odd[0] is not None and merely_odd[-1] is None
    assert None not in suspect[:2] and suspect[2] is None


async def test_an_alarm_is_no_occasion_for_hearing_whom_nothing_is_held_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = Nodes()
    judge, calls = judge_of(nodes), []
    monkeypatch.setattr(judge, "_routine_hearing", lambda group, heard: calls.append(group) or [])
    nodes.work(judge, range(5))
    await judge.sit(set(), nodes.peers)
    assert calls
    calls.clear()
    nodes.work(judge, range(5, 10))
    microbatch = list(nodes.trips)[-1]
    passage = Passage(microbatch, nodes.peers[1], nodes.peers[1], 3, Direction.GRADIENT, b"weights!")
    judge.traffic.take(nodes.peers[0], 0, [passage], monotonic(), monotonic())
    await judge.sit(set(), nodes.peers)
    judge.stop()
    assert judge.counts["alarms"] == 1 and not calls


async def test_that_somebody_is_accused_makes_nobody_else_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or whoever is suspected, or a single verifier that says so, would end the hearings of all others."""
    nodes = Nodes()
    judge, calls = judge_of(nodes), []
    monkeypatch.setattr(judge, "_routine_hearing", lambda group, heard: calls.append(group) or [])
    accused = {nodes.peers[1]}
    nodes.work(judge, range(10))
    await judge.sit(accused, nodes.peers)
    assert not calls, "a panel for the accused"
    nodes.work(judge, range(10, 20))
    await judge.sit(accused, nodes.peers)
    judge.stop()
    assert calls, "a routine panel"


@pytest.mark.parametrize("count", [1, 3, 40, 200])
async def test_however_many_replicas_a_stage_has_there_is_enough_for_an_alarm_and_for_a_hearing(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.judge.hear", undecided)
    judge = judge_of(Nodes())
    replicas = with_replicas(judge, count)
    judge.earn(1_000_000)
    assert judge._alarms.can_pay(judge._panel_size)
    heard = await judge._hear(a_work(Direction.GRADIENT), [*replicas, Identity.generate().peer_id], True)
    judge.stop()
    assert heard is not None
