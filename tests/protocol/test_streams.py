"""Frames through a stream's buffers, however the network cuts them; and its bounds."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import messages, streams, wire
from protocol.codec import Payload, TensorHeader, leaves_of
from protocol.errors import ProtocolError, Reason
from protocol.messages import MAX_CHUNK, PROTOCOL_VERSION, Activation, Hello, Kind, Ping, Pong, Reply, Request
from protocol.streams import Stream
from tests.protocol.strategies import messages_of, mutated

MAX_TENSOR = 4096
TENSOR = TensorHeader("bf16", (3, 4, 10))
REFUSED, UNWANTED = (3, 10, 4), (1 << 24,)
HELLO = Hello(PROTOCOL_VERSION, b"r" * 32, 1, b"session!")
FRAMED = [kind for kind in messages._KINDS if kind not in (Ping, Pong, Hello)]


class Pipe(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.waiting = 0
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class Ear:
    """A stream on a pipe, and all that came out of it."""

    def __init__(self, *, greeted: bool = True) -> None:
        self.heard: list[tuple[wire.Message, bytes]] = []
        self.leaves: list[tuple[bytes, ...]] = []
        self.violations: list[ProtocolError] = []
        self.pipe = Pipe()
        self.stream = Stream(
            HELLO,
            MAX_TENSOR,
            self._announce,
            self._hear,
            lambda stream: None,
            lambda stream, error: self.violations.append(error),
        )
        self.stream.connection_made(self.pipe)
        self.stream.greeted = greeted

    def _announce(self, message: Activation | messages.Gradient, size: int) -> bool:
        if message.tensor.shape == REFUSED:
            raise ProtocolError(Reason.WRONG_SHAPE)
        return message.tensor.shape != UNWANTED

    def _hear(self, stream: Stream, message: wire.Message, payload: Payload) -> None:
        self.heard.append((message, bytes(payload.data)))
        self.leaves.append(payload.leaves)

    def feed(self, data: bytes, cuts: list[int] | None = None) -> None:
        """As an event loop does: fill the buffer that the stream offers, at most up to the next cut."""
        cuts = list(cuts or [])
        while data and not self.pipe.closed:
            buffer = self.stream.get_buffer(65536)
            assert 0 < len(buffer) <= max(MAX_TENSOR, MAX_CHUNK)
            size = min(len(data), len(buffer), cuts.pop() if cuts else len(data))
            buffer[:size] = data[:size]
            data = data[size:]
            self.stream.buffer_updated(size)


def framed(message: wire.Message, payload: bytes = b"") -> bytes:
    return messages.frame_of(message, len(payload)) + payload


@st.composite
def frames(draw: st.DrawFn) -> tuple[wire.Message, bytes]:
    message = draw(st.sampled_from(FRAMED).flatmap(messages_of))
    if isinstance(message, Activation | messages.Gradient):  # Of another shape the owner would refuse it.
        message = msgspec.structs.replace(message, tensor=TENSOR)
    carries = isinstance(message, Activation | messages.Gradient | Request | Reply)
    return message, draw(st.binary(max_size=MAX_TENSOR)) if carries else b""


@given(st.lists(frames(), max_size=5), st.lists(st.integers(1, 200), max_size=60))
@settings(max_examples=40)
def test_frames_arrive_whole_however_they_are_cut(
    sent: list[tuple[wire.Message, bytes]], cuts: list[int]
) -> None:
    ear = Ear()
    ear.feed(b"".join(framed(*frame) for frame in sent), cuts)
    assert ear.heard == sent
    assert not ear.violations


@given(
    st.sampled_from([Activation, messages.Gradient]).flatmap(messages_of),
    st.binary(min_size=TENSOR.size, max_size=TENSOR.size + 48),
    st.lists(st.integers(1, 100), max_size=60),
)
@settings(max_examples=40)
def test_a_tensor_is_digested_leaf_by_leaf_while_it_arrives(
    sent: Activation | messages.Gradient, payload: bytes, cuts: list[int]
) -> None:
    ear = Ear()
    ear.feed(framed(msgspec.structs.replace(sent, tensor=TENSOR), payload), cuts)
    data = memoryview(payload)
    labels = data[TENSOR.size :]
    expected = leaves_of(TENSOR, data[: TENSOR.size], *([labels] if labels else []))
    assert ear.leaves == [expected]


@given(st.sampled_from([Activation, messages.Gradient]).flatmap(messages_of))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tensor_is_refused_before_its_memory_is_allocated(
    monkeypatch: pytest.MonkeyPatch, sent: Activation | messages.Gradient
) -> None:
    monkeypatch.setattr(streams.np, "empty", lambda *_: pytest.fail("allocated"))
    ear = Ear()
    message = msgspec.structs.replace(sent, tensor=TensorHeader("bf16", REFUSED))
    ear.feed(messages.frame_of(message, TENSOR.size))
    assert [error.reason for error in ear.violations] == [Reason.WRONG_SHAPE]
    assert ear.pipe.closed


@given(st.sampled_from([Activation, messages.Gradient]).flatmap(messages_of), st.binary(max_size=MAX_TENSOR))
@settings(max_examples=5)
def test_a_tensor_that_nobody_wants_passes_undigested(
    sent: Activation | messages.Gradient, payload: bytes
) -> None:
    ear = Ear()
    ear.feed(framed(msgspec.structs.replace(sent, tensor=TensorHeader("bf16", UNWANTED)), payload))
    assert ear.leaves == [()] and not ear.violations


@given(st.data(), st.lists(frames(), min_size=1, max_size=3), st.lists(st.integers(1, 100), max_size=20))
@settings(max_examples=40)
def test_damaged_frames_end_the_stream_with_the_protocols_error(
    data: st.DataObject, sent: list[tuple[wire.Message, bytes]], cuts: list[int]
) -> None:
    ear = Ear()
    ear.feed(data.draw(mutated(b"".join(framed(*frame) for frame in sent))), cuts)
    assert len(ear.violations) == ear.pipe.closed
    assert len(ear.heard) <= 100


@given(st.binary(min_size=16, max_size=5000))
@settings(max_examples=40)
def test_noise_ends_the_stream(noise: bytes) -> None:
    ear = Ear(greeted=False)
    ear.feed(noise)
    assert ear.pipe.closed
    assert [error.reason for error in ear.violations] == [Reason.MALFORMED]


@pytest.mark.parametrize(
    "kind, message, payload",
    [
        (Kind.ACTIVATION, 100, 1 << 30),
        (Kind.GRADIENT, 100, MAX_TENSOR + 1),
        (Kind.REQUEST, 100, MAX_CHUNK + 1),
        (Kind.CREDIT, 100, 1),
        (Kind.CREDIT, messages.MAX_MESSAGE + 1, 0),
    ],
)
def test_too_large_a_frame_is_refused_before_its_memory_is_allocated(
    kind: Kind, message: int, payload: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.np, "empty", lambda *_: pytest.fail("allocated"))
    ear = Ear()
    ear.feed(messages._HEADER.pack(messages._MAGIC, kind, message, payload))
    assert [error.reason for error in ear.violations] == [Reason.OVERSIZED]
    assert ear.pipe.closed


def test_nothing_is_read_before_the_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.np, "empty", lambda *_: pytest.fail("allocated"))
    for kind in set(Kind) - {Kind.HELLO, Kind.FAREWELL}:
        ear = Ear(greeted=False)
        ear.feed(messages._HEADER.pack(messages._MAGIC, kind, 10, 0))
        assert [error.reason for error in ear.violations] == [Reason.MALFORMED]
        assert ear.pipe.closed


def test_a_ping_is_answered_unless_the_answers_pile_up() -> None:
    ear = Ear()
    before = len(ear.pipe.written)
    ear.feed(framed(Ping(7)))
    assert ear.pipe.written[before:] == [messages.frame_of(Pong(7))]
    ear.pipe.waiting = 2 << 20
    ear.feed(framed(Ping(8)))
    assert len(ear.pipe.written) == before + 1


def test_the_greeting_is_the_first_thing_said() -> None:
    assert Ear().pipe.written[0] == messages.frame_of(HELLO)


def test_a_peer_that_never_reads_loses_the_stream() -> None:
    ear = Ear()
    ear.pipe.waiting = streams.MAX_BACKLOG + 2 * MAX_TENSOR + 1
    ear.stream.send(messages.Credit(1))
    assert ear.pipe.closed
    assert [error.reason for error in ear.violations] == [Reason.NOT_READING]


def test_a_socket_whose_peer_is_gone_is_closed_only_once() -> None:
    """The second time it would be somebody else's descriptor. As nodes do, on uvloop."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.close()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(streams.attach(Ear().stream, ours))
    assert ours.fileno() == -1
