"""It is bounded: whatever a neighbour sends, a node refuses it, counts it, says so, and serves the others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from node import patience, pipeline
from node.flights import Phase
from protocol import links, messages
from protocol.codec import TensorHeader
from protocol.errors import Reason
from protocol.links import Link
from protocol.messages import Activation, Credit, Gradient, Hello, Kind, Refusal, Reply
from protocol.receipts import Direction, MicrobatchId
from tests.node.neighbours import (
    Neighbour,
    Place,
    Victim,
    hung_up,
    raw_stream,
    responsive,
    round_trip,
    say,
    until,
)
from tests.swarms import small_manifest

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

CAPACITY = 4
HOLD_BYTES = 64 * 1024
MEMORY = 64 << 20
"""Bytes by which the process may grow: what is not bounded grows past this at once."""


@dataclass
class Scene:
    """A victim between an honest head and an honest tail, and a place for who is not honest."""

    victim: Victim
    head: Neighbour
    tail: Neighbour
    elsewhere: Place
    _more: list[Neighbour]

    async def enter(self, stage: int) -> Neighbour:
        """Another neighbour, which says it serves `stage`."""
        self._more.append(Neighbour(self.elsewhere, self.victim, stage))
        return await self._more[-1].meet()


@pytest_asyncio.fixture(loop_scope="module")
async def scene(places: list[Place], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """At the end the victim must still serve its honest neighbours, and hold no more than it may."""
    monkeypatch.setattr(links, "PENALTY", 0.0)
    victim = Victim(places[0], small_manifest(), capacity=CAPACITY, hold_bytes=HOLD_BYTES)
    head, tail = Neighbour(places[1], victim, 0), Neighbour(places[2], victim, 2)
    scene = Scene(victim, head, tail, places[3], [])
    try:
        await victim.switchboard.start()
        await asyncio.gather(head.meet(), tail.meet())
        await head.expect(Credit)
        process = psutil.Process(os.getpid())
        before = process.memory_info().rss
        async with responsive():
            yield scene
        assert process.memory_info().rss - before < MEMORY
        assert victim.pipeline.finished.bytes <= HOLD_BYTES
        await round_trip(head, tail, 3, attempt=15)
        assert not victim.pipeline.flights
        assert Reason.INTERNAL not in victim.refused
        assert victim.pipeline._error is None
    finally:
        for one in (*scene._more, head, tail, victim):
            await one.stop()


# --- activations that are not what they should be ---


Act = Callable[[Neighbour, Scene], None]


def sends(
    *, signer: str = "", header: TensorHeader | None = None, payload: bytes | None = None, **changes: Any
) -> Act:
    """An activation that differs from an honest one in what is named. `payload` is sent, not signed."""

    def act(evil: Neighbour, scene: Scene) -> None:
        microbatch = changes.pop("microbatch", None) or MicrobatchId(evil.place.identity.peer_id, 1)
        honest = evil.payload()
        direction = changes.pop("direction", Direction.ACTIVATION)
        if changes.get("sender") == "another":
            changes["sender"] = scene.head.place.identity.peer_id
        if changes.get("recipient") == "another":
            changes["recipient"] = scene.head.place.identity.peer_id
        key = scene.head.place.identity if signer == "another" else None
        receipt = evil.sign(microbatch, direction, honest, signer=key, **changes)
        sent = honest if payload is None else payload
        evil.link.send(Activation(receipt, header or evil.header), memoryview(sent))

    return act


def speaks_for_another_head(evil: Neighbour, scene: Scene) -> None:
    sends(microbatch=MicrobatchId(scene.head.place.identity.peer_id, 1))(evil, scene)


SHAPE = (2, 32, 32)
REJECTED: dict[str, tuple[Act, Reason]] = {
    "of another run": (sends(run=b"x" * 32), Reason.FOREIGN_RUN),
    "signed by another": (sends(signer="another"), Reason.BAD_SIGNATURE),
    "another's receipt": (sends(sender="another", signer="another"), Reason.WRONG_PEER),
    "for another": (sends(recipient="another"), Reason.WRONG_PEER),
    "of another head": (speaks_for_another_head, Reason.WRONG_PEER),
    "of another stage": (sends(stage=2), Reason.WRONG_STAGE),
    "of another shape": (sends(header=TensorHeader("fp32", (1, 64, 32))), Reason.WRONG_SHAPE),
    "of a huge shape": (sends(header=TensorHeader("fp32", (1 << 24,) * 4)), Reason.WRONG_SHAPE),
    "of another dtype": (sends(header=TensorHeader("bf16", SHAPE)), Reason.WRONG_DTYPE),
    "of no dtype": (sends(header=TensorHeader("int8", SHAPE)), Reason.WRONG_DTYPE),
    "cut short": (sends(payload=bytes(100)), Reason.MALFORMED),
    "empty": (sends(payload=b""), Reason.MALFORMED),
    "too large": (sends(payload=bytes(2 * 32 * 32 * 4 + 2 * 32 * 4 + 1)), Reason.OVERSIZED),
    "with a gradient's receipt": (sends(direction=Direction.GRADIENT), Reason.MALFORMED),
    "of another content": (sends(payload=bytes(2 * 32 * 32 * 4 + 2 * 32 * 4)), Reason.WRONG_DIGEST),
}


@pytest.mark.parametrize("name", REJECTED)
async def test_a_forged_activation_is_rejected(scene: Scene, name: str) -> None:
    act, reason = REJECTED[name]
    evil = await scene.enter(0)
    await evil.expect(Credit)
    with capture_logs() as logs:
        act(evil, scene)
        await evil.until_shut_out()
        await scene.victim.until_refused(reason)
    assert scene.victim.refused == {reason: 1}
    (line,) = [line for line in logs if line["event"] == "rejected"]
    assert line["reason"] == reason.value
    assert line["peer"] == evil.place.identity.peer_id
    assert not scene.victim.pipeline.flights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_an_activation_that_is_not_finite_is_ignored_with_an_answer(scene: Scene, value: float) -> None:
    evil = await scene.enter(0)
    await evil.expect(Credit)
    with capture_logs() as logs:
        microbatch = evil.activate(1, value)
        refusal, _ = await evil.expect(Refusal)
    assert refusal == Refusal(microbatch, Direction.ACTIVATION, Reason.NOT_FINITE)
    assert scene.victim.refused == {Reason.NOT_FINITE: 1}
    assert [line["reason"] for line in logs if line["event"] == "ignored"] == ["not_finite"]
    assert evil.link.is_up


async def test_a_microbatch_of_a_far_round_is_ignored_with_an_answer(scene: Scene) -> None:
    evil = await scene.enter(0)
    await evil.expect(Credit)
    microbatch = evil.activate(10_000)
    refusal, _ = await evil.expect(Refusal)
    assert refusal == Refusal(microbatch, Direction.ACTIVATION, Reason.TOO_EARLY)
    assert scene.victim.refused == {Reason.TOO_EARLY: 1}


async def test_a_replay_is_refused_while_the_first_is_under_way_and_afterwards(scene: Scene) -> None:
    head, tail, victim = scene.head, scene.tail, scene.victim
    microbatch = head.activate(1)
    head.activate(1)
    refusal, _ = await head.expect(Refusal)
    assert refusal == Refusal(microbatch, Direction.ACTIVATION, Reason.REPLAYED)
    tail.link.send(Credit(4))
    tail.answer(await tail.take())
    await head.expect(Gradient)
    head.activate(1)
    refusal, _ = await head.expect(Refusal)
    assert refusal.reason is Reason.REPLAYED
    assert victim.refused == {Reason.REPLAYED: 2}
    assert victim.pipeline.counts["microbatches"] == 1
    assert tail.inbox.empty()


async def test_who_serves_another_stage_sends_no_activations(scene: Scene) -> None:
    evil = await scene.enter(2)
    sends()(evil, scene)
    await evil.until_shut_out()
    assert scene.victim.refused == {Reason.WRONG_STAGE: 1}


# --- gradients ---


async def given_an_activation(scene: Scene) -> tuple[Neighbour, MicrobatchId]:
    """A neighbour of the next stage that has been given work."""
    evil = await scene.enter(2)
    evil.link.send(Credit(1))
    scene.head.activate(1)
    return evil, await evil.take()


async def test_a_gradient_that_nobody_asked_for_is_ignored(scene: Scene) -> None:
    evil, microbatch = await given_an_activation(scene)
    with capture_logs() as logs:
        evil.answer(MicrobatchId(microbatch.head, 99))
        scene.tail.answer(microbatch)  # Of the right microbatch, from a peer that it was not given to.
        await scene.victim.until_refused(Reason.UNSOLICITED, 2)
        evil.answer(microbatch)
        await scene.head.expect(Gradient)
        evil.answer(microbatch)  # Again.
        await scene.victim.until_refused(Reason.UNSOLICITED, 3)
    assert scene.victim.refused == {Reason.UNSOLICITED: 3}
    assert {line["reason"] for line in logs if line["event"] == "ignored"} == {"unsolicited"}


async def test_a_gradient_that_is_not_finite_loses_the_microbatch_and_no_more(scene: Scene) -> None:
    evil, microbatch = await given_an_activation(scene)
    evil.answer(microbatch, float("nan"))
    refusal, _ = await scene.head.expect(Refusal)
    assert refusal == Refusal(microbatch, Direction.ACTIVATION, Reason.NOT_FINITE)
    assert scene.victim.refused == {Reason.NOT_FINITE: 1}
    assert scene.victim.pipeline.counts["lost"] == 1
    assert scene.victim.passes.slots == []
    await evil.leave()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"output": b"x" * 32}, Reason.WRONG_DIGEST),
        ({"stage": 1}, Reason.WRONG_STAGE),
        ({"run": b"x" * 32}, Reason.FOREIGN_RUN),
        ({"direction": Direction.ACTIVATION}, Reason.MALFORMED),
    ],
)
async def test_a_forged_gradient_is_rejected(scene: Scene, changes: dict[str, Any], reason: Reason) -> None:
    evil, microbatch = await given_an_activation(scene)
    payload = bytes(evil.header.size)
    direction = changes.pop("direction", Direction.GRADIENT)
    receipt = evil.sign(microbatch, direction, payload, **changes)
    evil.link.send(Gradient(receipt, evil.header), memoryview(payload))
    await evil.until_shut_out()
    assert scene.victim.refused == {reason: 1}
    # The output is still held: another replica gets it.
    scene.tail.link.send(Credit(1))
    assert await scene.tail.take() == microbatch
    assert scene.victim.pipeline.counts["rerouted"] == 1
    scene.tail.answer(microbatch)
    await scene.head.expect(Gradient)


async def test_credit_from_the_wrong_stage_is_rejected(scene: Scene) -> None:
    evil = await scene.enter(0)
    evil.link.send(Credit(1))
    await evil.until_shut_out()
    assert scene.victim.refused == {Reason.WRONG_STAGE: 1}


# --- more than it can take ---


async def test_who_sends_more_than_its_credit_is_shut_out(scene: Scene) -> None:
    async with scene.victim.busy():
        evil = await scene.enter(0)
        await evil.expect(Credit)
        for slot in range(50):
            evil.activate(slot % 4, attempt=slot // 4)
        await evil.until_shut_out()
        assert len(scene.victim.pipeline.flights) <= CAPACITY
        assert scene.victim.refused == {Reason.OVER_CREDIT: 1}
    scene.tail.link.send(Credit(CAPACITY))
    for _ in range(len(scene.victim.pipeline.flights)):  # What came in time is worked on all the same.
        scene.tail.answer(await scene.tail.take())
    await until(lambda: not scene.victim.pipeline.flights)


async def test_one_that_computes_slowly_grants_no_more_than_its_capacity(scene: Scene) -> None:
    head, tail, victim = scene.head, scene.tail, scene.victim
    async with victim.busy():
        sent = 0
        while head.credit > 0:
            head.activate(sent % 4, attempt=sent // 4)
            sent += 1
            await asyncio.sleep(0)
        assert sent == CAPACITY
        assert len(victim.pipeline.flights) <= CAPACITY
    tail.link.send(Credit(CAPACITY))
    for _ in range(sent):
        tail.answer(await tail.take())
        await head.expect(Gradient)


async def test_coming_back_makes_no_room(scene: Scene) -> None:
    victim = scene.victim
    evil = await scene.enter(0)
    async with victim.busy():
        for attempt in range(6):
            while evil.credit > 0:
                evil.activate(evil.credit, attempt=attempt)
            # A frame that is answered comes after those before it.
            await answered(evil.link)
            await evil.leave()
            evil.credit = 0
            await evil.again()
            await answered(evil.link)
        assert len(victim.pipeline.flights) <= CAPACITY + 1
    scene.tail.link.send(Credit(32))
    for _ in range(len(victim.pipeline.flights)):
        scene.tail.answer(await scene.tail.take())
    await until(lambda: not victim.pipeline.flights)


async def answered(link: Link) -> None:
    """All that was sent before has been read: a question without a method is answered after it."""
    with pytest.raises(links.ProtocolError, match="unknown_method"):
        await link.request("?", Credit(1), timeout=10.0)


# --- a receiver that does not answer ---


async def test_a_silent_receiver_costs_its_microbatches_and_is_avoided(scene: Scene) -> None:
    head, tail, victim = scene.head, scene.tail, scene.victim
    await round_trip(head, tail, 0)
    silent = await scene.enter(2)
    silent.link.send(Credit(1000))
    await until(lambda: head.credit == CAPACITY)
    for slot in range(CAPACITY):
        head.activate(slot, attempt=1)
    for _ in range(CAPACITY):
        await silent.take()
    assert len(victim.pipeline.flights) == CAPACITY
    for flight in victim.pipeline.flights.values():  # A minute later...
        flight.sent_at -= patience.FLIGHT_TIMEOUT + 1
    victim.pipeline.check_timeouts()
    assert not victim.pipeline.flights
    for _ in range(CAPACITY):
        assert (await head.expect(Refusal))[0].reason is Reason.TIMED_OUT
    assert victim.refused == {Reason.TIMED_OUT: CAPACITY}
    assert victim.pipeline.counts["lost"] == CAPACITY
    # Of the next ones at most one more goes to it, though it grants more; and that one is not lost when it ends.
    tail.link.send(Credit(10))
    await answered(tail.link)

    async def serve() -> None:
        while True:
            tail.answer(await tail.take())

    serving = asyncio.create_task(serve())
    for attempt in range(2, 7):
        await until(lambda: head.credit > 0)
        head.activate(0, attempt=attempt)
    await until(lambda: victim.pipeline.counts["microbatches"] >= 5)
    assert silent.inbox.qsize() <= 1
    await silent.leave()
    await until(lambda: victim.pipeline.counts["microbatches"] == 6)
    serving.cancel()
    for _ in range(5):
        await head.expect(Gradient)


async def test_a_receiver_that_keeps_what_it_gets_is_soon_given_up_and_shunned(scene: Scene) -> None:
    head, tail, victim = scene.head, scene.tail, scene.victim
    for attempt in range(patience._ENOUGH):  # Then the victim knows how long it usually takes.
        await round_trip(head, tail, 0, attempt)
    black_hole = await scene.enter(2)
    black_hole.link.send(Credit(1000))
    head.activate(1)
    kept = await black_hole.take()  # The tail has given no credit.
    (flight,) = victim.pipeline.flights.values()
    limit = victim.pipeline._patience.limit(0)
    assert limit < patience.FLIGHT_TIMEOUT
    flight.sent_at -= limit
    victim.pipeline.check_timeouts()
    assert (await head.expect(Refusal))[0].microbatch == kept
    assert victim.refused == {Reason.TIMED_OUT: 1}
    assert victim.pipeline.shunned == [black_hole.place.identity.peer_id]
    # It waits for the tail rather than use the other one again.
    for attempt in range(1, 5):
        head.activate(1, attempt=attempt)
        await until(lambda: any(one.phase is Phase.UNSENT for one in victim.pipeline.flights.values()))
        tail.link.send(Credit(1))
        tail.answer(await tail.take())
        await head.expect(Gradient)
    # But where there is nobody else it gets another chance.
    await tail.leave()
    head.activate(1, attempt=5)
    black_hole.answer(await black_hole.take())
    await head.expect(Gradient)
    assert black_hole.inbox.empty()
    await tail.again()
    await black_hole.leave()


async def test_a_receiver_that_ends_gets_its_work_taken_elsewhere(scene: Scene) -> None:
    evil, microbatch = await given_an_activation(scene)
    scene.tail.link.send(Credit(1))
    await evil.leave()
    assert await scene.tail.take() == microbatch
    scene.tail.answer(microbatch)
    await scene.head.expect(Gradient)
    assert scene.victim.pipeline.counts["rerouted"] == 1


async def test_a_receiver_that_does_not_read_gets_no_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = await scene.enter(2)
    peer = stuck.place.identity.peer_id
    backlog = property(lambda link: pipeline._MAX_BACKLOG + 1 if link.peer == peer else 0)
    monkeypatch.setattr(Link, "backlog", backlog)
    stuck.link.send(Credit(1000))
    await answered(stuck.link)
    scene.tail.link.send(Credit(4))
    for slot in range(4):
        scene.head.activate(slot)
        scene.tail.answer(await scene.tail.take())
        await scene.head.expect(Gradient)
    assert stuck.inbox.empty()
    await stuck.leave()


async def test_giving_up_what_waits_for_its_backward_pass_is_no_error(scene: Scene) -> None:
    scene.tail.link.send(Credit(1))
    microbatch = scene.head.activate(1)
    await scene.tail.take()
    async with scene.victim.busy():
        scene.tail.answer(microbatch)
        await answered(scene.tail.link)
        scene.victim.pipeline.hand_back()
    assert (await scene.head.expect(Refusal))[0] == Refusal(microbatch, Direction.ACTIVATION, Reason.LEAVING)
    assert scene.victim.passes.slots == []


# --- noise ---


async def test_ten_thousand_unwanted_messages_in_one_stream(scene: Scene) -> None:
    evil = await scene.enter(2)
    gradient = bytes(evil.header.size)
    microbatch = MicrobatchId(evil.place.identity.peer_id, 1)
    receipt = evil.sign(microbatch, Direction.GRADIENT, gradient)
    for number in range(5_000):
        evil.link.send(Reply(number, None, b"x" * 100))
        if number % 10 == 0:
            evil.link.send(Gradient(receipt, evil.header), memoryview(gradient))
            evil.link.send(Refusal(microbatch, Direction.ACTIVATION, Reason.BUSY))
        if number % 100 == 0:
            await asyncio.sleep(0)
    await scene.victim.until_refused(Reason.UNSOLICITED, 5_500)
    assert set(scene.victim.refused) == {Reason.UNSOLICITED}
    stream = await raw_stream(scene.elsewhere, scene.victim, stage=2, session=evil.link.session)
    await say(stream, os.urandom(64) * 10_000)
    await hung_up(stream)
    await scene.victim.until_refused(Reason.MALFORMED)
    assert scene.victim.refused[Reason.MALFORMED] == 1


async def test_noise_in_hundreds_of_fresh_streams(scene: Scene) -> None:
    noise = [os.urandom(200), b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b"\x5e\x17\x01" + b"\xff" * 40]

    with capture_logs() as logs:
        for number in range(400):
            stream = await raw_stream(scene.elsewhere, scene.victim)
            await say(stream, noise[number % len(noise)])
            await hung_up(stream)
    await scene.victim.until_refused(Reason.MALFORMED, 300)
    assert scene.victim.refused == {Reason.MALFORMED: 300, Reason.OVERSIZED: 100}
    assert len(logs) < 50  # Counted always, logged at a bounded rate.
    assert len(scene.victim.switchboard.links) == 2


async def test_who_broke_the_protocol_is_shut_out_for_a_while(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "PENALTY", 60.0)
    for _ in range(5):
        stream = await raw_stream(scene.elsewhere, scene.victim)
        await say(stream, b"noise" * 10)
        await hung_up(stream)
    assert scene.victim.refused == {Reason.MALFORMED: 1, Reason.SHUT_OUT: 4}


@pytest.mark.parametrize("kind", [Kind.ACTIVATION, Kind.GRADIENT, Kind.REPLY])
async def test_a_header_of_a_gibibyte_is_refused_at_once(scene: Scene, kind: Kind) -> None:
    stream = await raw_stream(scene.elsewhere, scene.victim, stage=0)
    await say(stream, messages._HEADER.pack(messages._MAGIC, kind, 100, 1 << 30))
    await hung_up(stream)
    await scene.victim.until_refused(Reason.OVERSIZED)
    assert scene.victim.refused == {Reason.OVERSIZED: 1}


GREETINGS: dict[str, tuple[Callable[[Victim], Hello], Reason]] = {
    "of another run": (
        lambda victim: Hello(1, victim.run[:8] + b"x" * 24, 0, b"evil" * 2),
        Reason.FOREIGN_RUN,
    ),
    "of another version": (lambda victim: Hello(2, victim.run, 0, b"evil" * 2), Reason.WRONG_VERSION),
}


@pytest.mark.parametrize("name", GREETINGS)
async def test_a_hello_of_elsewhere_is_refused(scene: Scene, name: str) -> None:
    make, reason = GREETINGS[name]
    stream = await raw_stream(scene.elsewhere, scene.victim)
    await say(stream, messages.frame_of(make(scene.victim)))
    await hung_up(stream)
    assert scene.victim.refused == {reason: 1}


async def test_a_second_hello_is_refused(scene: Scene) -> None:
    stream = await raw_stream(scene.elsewhere, scene.victim, stage=0)
    await say(stream, messages.frame_of(Hello(1, scene.victim.run, 0, b"evil" * 2)))
    await hung_up(stream)
    assert scene.victim.refused == {Reason.MALFORMED: 1}


async def test_one_peer_serves_one_stage(scene: Scene) -> None:
    streams = [await raw_stream(scene.elsewhere, scene.victim, stage=stage) for stage in (0, 2)]
    for stream in streams:
        await hung_up(stream)
    assert scene.victim.refused == {Reason.WRONG_STAGE: 1}


async def test_streams_of_one_peer_are_few(scene: Scene) -> None:
    streams = [await raw_stream(scene.elsewhere, scene.victim, stage=0) for _ in range(links.MAX_STREAMS + 3)]
    await scene.victim.until_refused(Reason.BUSY, 3)
    link = scene.victim.switchboard.links[scene.elsewhere.identity.peer_id]
    assert len(link.streams) == links.MAX_STREAMS
    for stream in streams:
        stream.close()


# --- what is kept ---


async def test_what_is_kept_of_finished_microbatches_is_bounded(scene: Scene) -> None:
    for attempt in range(12):
        await round_trip(scene.head, scene.tail, 1, attempt)
        assert 0 < scene.victim.pipeline.finished.bytes <= HOLD_BYTES
    assert len(scene.victim.pipeline.finished) < 12


async def test_receipts_of_a_path_chain_through_a_node(scene: Scene) -> None:
    head, tail = scene.head, scene.tail
    head.activate(1)
    tail.link.send(Credit(1))
    forward, _ = await tail.expect(Activation)
    assert forward.receipt.receipt.input == head.digest(head.payload())
    tail.answer(forward.receipt.receipt.microbatch)
    back, _ = await head.expect(Gradient)
    kept = scene.victim.pipeline.finished.get(forward.receipt.receipt.microbatch)
    assert kept is not None and kept.gradient.receipt is not None
    assert back.receipt.receipt.input == kept.gradient.receipt.receipt.output
