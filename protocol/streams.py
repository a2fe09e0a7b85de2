"""One stream between two peers as frames: the framing, its bounds and its heartbeat."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from time import monotonic
from typing import cast

import numpy as np
import uvloop

from protocol import messages, wire
from protocol.codec import ArrivingTensor, Payload
from protocol.errors import ProtocolError, Reason
from protocol.messages import HEADER_SIZE, Activation, Gradient, Kind, Ping, Pong

OnTensor = Callable[[Activation | Gradient, int], bool]
OnFrame = Callable[["Stream", wire.Message, Payload], None]
OnClosed = Callable[["Stream"], None]

_EMPTY = memoryview(b"")
_MAX_BACKLOG_FOR_PONG = 1024 * 1024
MAX_BACKLOG = 256 * 1024 * 1024
"""Bytes that may wait for a peer that does not read, on one stream, beyond two tensors; more ends the link."""


class Stream(asyncio.BufferedProtocol):
    """Reads frames straight into the memory that keeps them; writes without copying the payload.

    `greeting` is the first thing sent. `on_tensor` is called with an activation or gradient and its payload's size,
    before memory is allocated for it, and says whether it is to be digested, answering for its shape; `on_frame` for
    each frame but pings and pongs. Both run on the event loop and must not block. Until `greeted` is set only a hello
    or a farewell is read. A `ProtocolError` out of parsing or out of either goes to `on_violation`, and the stream is
    aborted.
    """

    def __init__(
        self,
        greeting: wire.Message,
        max_tensor: int,
        on_tensor: OnTensor,
        on_frame: OnFrame,
        on_closed: OnClosed,
        on_violation: Callable[[Stream, ProtocolError], None],
        delay: float = 0.0,
    ) -> None:
        self._greeting, self._max_tensor = greeting, max_tensor
        self._on_tensor, self._on_frame = on_tensor, on_frame
        self._on_closed, self._on_violation = on_closed, on_violation
        self._delay = delay
        self._transport: asyncio.Transport | None = None
        self._header = memoryview(bytearray(HEADER_SIZE))
        self._kind: Kind | None = None
        self._message: wire.Message | None = None
        self._payload_size = 0
        self._arriving: ArrivingTensor | None = None
        self._part, self._filled = self._header, 0
        self.greeted = False
        self.last_heard = monotonic()
        self.round_trip = math.inf
        """Seconds, the least of all heartbeats answered: what took longer waited for a busy end, not for the wire."""
        self.timed = 0
        """Heartbeats answered."""
        self.received_bytes = 0
        self.sent_bytes = 0

    # --- receiving: header, then message and payload, each into memory of its own size ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Before anything that a frame read in the meantime may make us say.
        self.send(self._greeting)

    def _aim(self, part: memoryview) -> None:
        self._part, self._filled = part, 0

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._part[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self.last_heard = monotonic()
        self.received_bytes += nbytes
        self._filled += nbytes
        if self._arriving is not None:
            self._arriving.advance(self._filled)
        try:
            while self._filled == len(self._part):
                self._part_complete()
        except ProtocolError as error:
            self._on_violation(self, error)
            self.abort()

    def _part_complete(self) -> None:
        if self._kind is None:
            self._take_header()
        elif self._message is None:
            self._take_message(self._kind)
        else:
            message, arriving, memory = self._message, self._arriving, self._part
            self._kind = self._message = self._arriving = None
            self._aim(self._header)
            self._dispatch(message, arriving.payload() if arriving is not None else Payload(memory))

    def _take_header(self) -> None:
        kind, message_size, self._payload_size = messages.parse_header(bytes(self._header), self._max_tensor)
        # Before a stranger makes us allocate anything.
        if not self.greeted and kind not in (Kind.HELLO, Kind.FAREWELL):
            raise ProtocolError(Reason.MALFORMED, "no hello first")
        self._kind = kind
        self._aim(memoryview(bytearray(message_size)))

    def _take_message(self, kind: Kind) -> None:
        message = self._message = messages.parse_message(kind, self._part)
        tensor = message if isinstance(message, Activation | Gradient) else None
        is_wanted = tensor is not None and self._on_tensor(tensor, self._payload_size)
        # Not zeroed: the network fills it. This is the memory that the tensor will be a view of.
        self._aim(memoryview(np.empty(self._payload_size, np.uint8).data) if self._payload_size else _EMPTY)
        if tensor is not None and is_wanted:
            self._arriving = ArrivingTensor(tensor.tensor, self._part)

    def _dispatch(self, message: wire.Message, payload: Payload) -> None:
        if isinstance(message, Ping):
            if self.backlog < _MAX_BACKLOG_FOR_PONG:
                self.send(Pong(message.token))
        elif isinstance(message, Pong):
            self.round_trip = min(self.round_trip, max(0.0, monotonic() - message.token / 1e6))
            self.timed += 1
        else:
            self._on_frame(self, message, payload)

    # --- sending ---

    @property
    def backlog(self) -> int:
        """Bytes written but not yet taken by p2pd."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: wire.Message, *payload: memoryview) -> None:
        """Queue a frame. The payload's parts are not copied: their memory must not change until it has left."""
        parts: tuple[bytes | memoryview, ...] = (messages.frame_of(message, sum(map(len, payload))), *payload)
        if self._delay:
            asyncio.get_running_loop().call_later(self._delay, self._write, parts)
        else:
            self._write(parts)

    def _write(self, parts: tuple[bytes | memoryview, ...]) -> None:
        if self._transport is None or not self.is_open:
            return
        if self.backlog > MAX_BACKLOG + 2 * self._max_tensor:
            self._on_violation(self, ProtocolError(Reason.NOT_READING, f"{self.backlog} bytes wait"))
            self.abort()
            return
        try:
            self._transport.writelines(parts)
            self.sent_bytes += sum(map(len, parts))
        except RuntimeError:  # uvloop has closed it, and will tell us only later.
            return

    def ping(self) -> None:
        self.send(Ping(int(monotonic() * 1e6)))

    # --- ending ---

    def close(self) -> None:
        """Let what is queued leave, then close."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed(self)


async def attach(stream: Stream, endpoint: socket.socket) -> None:
    """Put `stream` on a connected socket. Raises `ProtocolError` (unreachable) if the socket is dead already."""
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.create_unix_connection(lambda: stream, sock=endpoint)
    except OSError as error:
        endpoint.close()
        raise ProtocolError(Reason.UNREACHABLE, str(error)) from None
    if transport.is_closing() and isinstance(loop, uvloop.Loop):
        # Our greeting already met a peer that is gone. uvloop has closed the descriptor then, before it knew of the
        # socket, which in the end would close whatever has its number by that time.
        endpoint.detach()
