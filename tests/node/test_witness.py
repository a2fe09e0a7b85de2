"""What a node tells verifiers, over a real p2pd: what passed, what it was sent, and work done again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio
import torch

from node import witness
from node.witness import Witness
from protocol import wire
from protocol.codec import TensorHeader, decode_tensor, digest
from protocol.errors import ProtocolError, Reason
from protocol.introduction import Deaf
from protocol.links import Answer, Link, Switchboard
from protocol.messages import Credit, Gradient
from protocol.receipts import Direction, MicrobatchId
from protocol.samples import SAMPLE_ALARM, SAMPLE_SHOW, Passage, Shown
from protocol.vote_set import VoteSet
from protocol.votes import Electorate
from tests.node.neighbours import CPU, Neighbour, Place, Victim, round_trip, until
from tests.swarms import small_manifest
from verifier import inquirer
from verifier.audit import agrees
from verifier.exhibits import Exhibit, Question, Work
from verifier.inquirer import Inquirer

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

MANIFEST = small_manifest()
ACTIVATION, GRADIENT = Direction.ACTIVATION, Direction.GRADIENT


@dataclass
class Court:
    """A node of stage 1 with its neighbours, and a verifier (on the head's p2pd) that asks it."""

    victim: Victim
    head: Neighbour
    tail: Neighbour
    verifier: Switchboard
    witness: Witness
    inquirer: Inquirer

    def question(self, microbatch: MicrobatchId, direction: Direction, sequence: int = 0) -> Question:
        return Question(self.victim.run, self.victim.peer, 1, microbatch, direction, sequence)

    async def show(self, question: Question, inquirer: Inquirer | None = None) -> Exhibit:
        """Raises why it is not shown."""
        (answer,) = await (inquirer or self.inquirer).show(question.holder, [question])
        if isinstance(answer, ProtocolError):
            raise answer
        return answer

    async def passed(self, slot: int) -> MicrobatchId:
        await round_trip(self.head, self.tail, slot)
        return MicrobatchId(self.head.place.identity.peer_id, slot)


@pytest_asyncio.fixture(loop_scope="module")
async def court(places: list[Place]) -> AsyncIterator[Court]:
    victim = Victim(places[0], MANIFEST, capacity=8, hold_bytes=1 << 24)
    victim.passes.trainer.memory = 2
    victim.passes.note_state(b"s" * 32)
    head, tail = Neighbour(places[1], victim, 0), Neighbour(places[2], victim, 2)
    judge = Switchboard(places[3].host, victim.run, stage=-1, owner=Deaf())
    votes = VoteSet(Electorate(victim.run, frozenset({places[3].identity.peer_id}), 1, 3600))
    asked = Witness(victim.switchboard, votes, victim.compute, victim.passes, victim.pipeline)
    try:
        await victim.switchboard.start()
        await judge.start(accept=False)
        await asyncio.gather(head.meet(), tail.meet(), judge.connect(victim.peer, places[0].addresses))
        await head.expect(Credit)
        yield Court(victim, head, tail, judge, asked, Inquirer(judge, MANIFEST))
    finally:
        for one in (head, tail, victim, judge):
            await one.stop()


async def test_it_lists_what_passed_and_goes_on_from_there(court: Court) -> None:
    first = await court.passed(1)
    link = court.verifier.links[court.victim.peer]
    listed = await court.inquirer.list_passages(link, 0)
    (passage,) = listed.passages
    assert passage.microbatch == first and passage.flagged is None and passage.state == b"s" * 8
    assert (passage.previous, passage.next) == (first.head, court.tail.place.identity.peer_id)
    second = await court.passed(2)
    later = await court.inquirer.list_passages(link, listed.serial)
    assert [one.microbatch for one in later.passages] == [second]


async def test_what_is_flagged_raises_an_alarm_and_is_listed_by_then(court: Court) -> None:
    flagged: asyncio.Future[Passage] = asyncio.get_running_loop().create_future()

    async def on_alarm(link: Link, body: bytes, payload: memoryview) -> Answer:
        (passage,) = (await court.inquirer.list_passages(link, 0)).passages
        flagged.set_result(passage)
        return b"", memoryview(b"")

    court.verifier.methods[SAMPLE_ALARM] = on_alarm
    sounding = asyncio.create_task(court.witness.sound_alarm())
    court.head.activate(1, float("nan"))
    async with asyncio.timeout(20):
        passage = await flagged
        await sounding
    assert passage.microbatch.slot == 1 and passage.flagged is ACTIVATION


@pytest.mark.parametrize("direction", Direction)
async def test_it_shows_what_it_was_sent_with_the_senders_receipt(court: Court, direction: Direction) -> None:
    microbatch = await court.passed(1)
    exhibit = await court.show(court.question(microbatch, direction, 1))
    sender = court.head if direction is ACTIVATION else court.tail
    assert exhibit.receipt.sender == sender.place.identity.peer_id
    assert torch.equal(
        exhibit.tensor, torch.full_like(exhibit.tensor, 0.5 if direction is ACTIVATION else 1e-3)
    )
    assert len(exhibit.labels) == (4 * MANIFEST.batch.context if direction is ACTIVATION else 0)


@pytest.mark.parametrize("chunk", [100, 2000, 1 << 22])
async def test_all_is_shown_at_once_in_as_many_parts_as_it_takes(
    court: Court, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(witness, "MAX_CHUNK", chunk)
    monkeypatch.setattr(inquirer, "MAX_WANTED", 3)
    held, other = await court.passed(1), await court.passed(2)
    unknown = MicrobatchId(held.head, 99)
    questions = [
        court.question(one, direction, sequence)
        for one in (unknown, held, other, unknown)
        for direction, sequence in ((ACTIVATION, 1), (GRADIENT, 0), (GRADIENT, 99))
    ]
    answers = await court.inquirer.show(court.victim.peer, questions)
    for question, answer in zip(questions, answers, strict=True):
        if question.microbatch == unknown:
            assert isinstance(answer, ProtocolError) and answer.reason is Reason.EXPIRED
        elif question.sequence == 99:
            assert isinstance(answer, ProtocolError) and answer.reason is Reason.WRONG_SHAPE
        else:
            assert isinstance(answer, Exhibit) and answer.receipt.microbatch == question.microbatch
            assert answer.receipt.direction is question.direction


async def test_what_expires_while_it_is_shown_spoils_nothing_else(
    court: Court, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "MAX_CHUNK", 2000)
    first, second = await court.passed(1), await court.passed(2)
    honest = court.victim.switchboard.methods[SAMPLE_SHOW]

    async def forgetful(link: Link, body: bytes, payload: memoryview) -> Answer:
        answer = await honest(link, body, payload)
        court.victim.pipeline.finished.remove(first)
        return answer

    court.victim.switchboard.methods[SAMPLE_SHOW] = forgetful
    questions = [court.question(one, ACTIVATION) for one in (first, second)]
    expired, shown = await court.inquirer.show(court.victim.peer, questions)
    assert isinstance(expired, ProtocolError) and expired.reason is Reason.EXPIRED
    assert isinstance(shown, Exhibit) and shown.receipt.microbatch == second


def _of_another(shown: Shown, payload: bytes) -> tuple[Shown, bytes]:
    return Shown(shown.answers[::-1]), payload


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        pytest.param(lambda shown, payload: (shown, b""), Reason.MALFORMED, id="nothing"),
        pytest.param(
            lambda shown, payload: (shown, payload + b"!"), Reason.MALFORMED, id="more than it should"
        ),
        pytest.param(lambda shown, payload: (shown, payload[::-1]), Reason.WRONG_DIGEST, id="something else"),
        pytest.param(_of_another, Reason.UNSOLICITED, id="the receipt of another tensor"),
    ],
)
async def test_what_is_wrong_with_what_is_shown_is_found(
    court: Court, lie: Callable[[Shown, bytes], tuple[Shown, bytes]], reason: Reason
) -> None:
    microbatch = await court.passed(1)
    honest = court.victim.switchboard.methods[SAMPLE_SHOW]

    async def dishonest(link: Link, body: bytes, payload: memoryview) -> Answer:
        body, payload = await honest(link, body, payload)
        shown, changed = lie(wire.decode(Shown, body), bytes(payload))
        return wire.encode(shown), memoryview(changed)

    court.victim.switchboard.methods[SAMPLE_SHOW] = dishonest
    questions = [court.question(microbatch, direction) for direction in Direction]
    answers = await court.inquirer.show(court.victim.peer, questions)
    assert [one.reason for one in answers if isinstance(one, ProtocolError)] == [reason, reason]


@pytest.mark.parametrize("direction", Direction)
async def test_work_done_again_is_the_work_that_was_done(court: Court, direction: Direction) -> None:
    """Also with weights that have moved on meanwhile."""
    head, tail, microbatch = court.head, court.tail, MicrobatchId(court.head.place.identity.peer_id, 1)
    head.activate(1)
    tail.link.send(Credit(1))
    await tail.take()
    tail.answer(microbatch)
    message, payload = await head.expect(Gradient)
    shown = {
        (1, ACTIVATION): await court.show(court.question(microbatch, ACTIVATION)),
        (1, GRADIENT): await court.show(court.question(microbatch, GRADIENT)),
    }
    header = court.victim.passes.header
    row = TensorHeader(header.codec, (1, *header.shape[1:]))
    sent = decode_tensor(payload[: row.size], row, CPU)
    trainer = court.victim.passes.trainer
    trainer.step(torch.ones(trainer.size))

    output = Exhibit(message.receipt, payload[: row.size], payload[:0], sent)
    peer = court.victim.peer
    work = Work(peer, 1, direction, 0, b"", output, shown[1, direction], shown[1, ACTIVATION])
    answer = await court.inquirer.redo(peer, work)
    assert answer.state == b"s" * 8
    if direction is GRADIENT:
        assert agrees(sent, answer.tensor)
    else:
        expected = trainer.redo(0, shown[1, ACTIVATION].tensor)
        assert torch.allclose(answer.tensor, expected, atol=1e-6)
    assert court.witness.seconds > 0


async def test_weights_that_are_not_kept_are_said_not_to_be(court: Court) -> None:
    microbatch = await court.passed(1)
    exhibit = await court.show(court.question(microbatch, ACTIVATION))
    trainer = court.victim.passes.trainer
    for _ in range(3):
        trainer.step(torch.ones(trainer.size))
    work = Work(court.victim.peer, 1, ACTIVATION, 0, b"", exhibit, exhibit, exhibit)
    with pytest.raises(ProtocolError) as caught:
        await court.inquirer.redo(court.victim.peer, work)
    assert caught.value.reason is Reason.EXPIRED


async def test_only_verifiers_are_answered(court: Court) -> None:
    microbatch = await court.passed(1)
    outsider = Inquirer(court.tail.switchboard, MANIFEST)
    with pytest.raises(ProtocolError) as caught:
        await court.show(court.question(microbatch, ACTIVATION), outsider)
    assert caught.value.reason is Reason.WRONG_PEER
    with pytest.raises(ProtocolError) as caught:
        await outsider.list_passages(court.tail.link, 0)
    assert caught.value.reason is Reason.WRONG_PEER


async def test_a_verifier_gets_no_more_than_its_share(court: Court, monkeypatch: pytest.MonkeyPatch) -> None:
    microbatch = await court.passed(1)
    monkeypatch.setattr(witness, "SHOWN_BURST", 0)
    monkeypatch.setattr(witness, "SHOWN_SHARE", 0.1)
    with pytest.raises(ProtocolError) as caught:
        for _ in range(10):
            await court.show(court.question(microbatch, ACTIVATION))
    assert caught.value.reason is Reason.BUSY


async def test_what_is_not_held_is_said_not_to_be(court: Court) -> None:
    microbatch = await court.passed(1)
    with pytest.raises(ProtocolError) as caught:
        await court.show(court.question(MicrobatchId(microbatch.head, 99), ACTIVATION))
    assert caught.value.reason is Reason.EXPIRED


async def test_what_was_given_up_is_kept_as_evidence(court: Court) -> None:
    """A tensor that is not used can still be shown to those who ask why."""
    court.head.activate(1, value=float("nan"))
    await court.victim.until_refused(Reason.NOT_FINITE)
    microbatch = MicrobatchId(court.head.place.identity.peer_id, 1)
    await until(lambda: court.victim.pipeline.dropped.get(microbatch) is not None)
    listed = await court.inquirer.list_passages(court.verifier.links[court.victim.peer], 0)
    assert [(one.microbatch, one.flagged) for one in listed.passages] == [(microbatch, ACTIVATION)]
    exhibit = await court.show(court.question(microbatch, ACTIVATION))
    assert bool(torch.isnan(exhibit.tensor).all())
    assert digest(exhibit.sequence) != exhibit.receipt.output
