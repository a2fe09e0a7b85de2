"""Every message of a stream between two peers. docs/protocol.md lists their checks in order.

A frame is a 16-byte header (magic, kind, length of the message, length of the payload), the message and the payload.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Annotated, Final

import msgspec

from protocol import wire
from protocol.codec import TensorHeader
from protocol.errors import ProtocolError, Reason
from protocol.receipts import Direction, MicrobatchId, SignedReceipt
from protocol.wire import Count, Digest, Natural

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE: Final = 64 * 1024
MAX_CHUNK: Final = 4 * 1024 * 1024
"""Bytes of payload that a request or reply may carry; larger things go in several."""

SESSION_SIZE: Final = 8

_HEADER: Final = struct.Struct(">HBxIQ")
_MAGIC: Final = 0x5E17
HEADER_SIZE: Final = _HEADER.size


class Kind(IntEnum):
    """The first byte of a frame's header after the magic: which message follows."""

    HELLO = 1
    PING = 2
    PONG = 3
    CREDIT = 4
    ACTIVATION = 5
    GRADIENT = 6
    REFUSAL = 7
    REQUEST = 8
    REPLY = 9
    FAREWELL = 10


class Hello(wire.Message, frozen=True):
    """First on every stream, both ways. `stage` is -1 for a peer that serves none.

    `session` names the sender's side of the link: all its streams say the same, and another says that it began anew.
    """

    version: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    run: Digest
    stage: Annotated[int, msgspec.Meta(ge=-1, le=4095)]
    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_SIZE, max_length=SESSION_SIZE)]


class Ping(wire.Message, frozen=True):
    token: Natural


class Pong(wire.Message, frozen=True):
    token: Natural


class Credit(wire.Message, frozen=True):
    """The receiver takes `amount` more activations. Gradients need none: they answer activations."""

    amount: Annotated[int, msgspec.Meta(ge=1, le=1024)]


class Activation(wire.Message, frozen=True):
    """Payload: the tensor (sequences, context, width), then the labels, int32 (sequences, context)."""

    receipt: SignedReceipt
    tensor: TensorHeader


class Gradient(wire.Message, frozen=True):
    """Payload: the tensor (sequences, context, width), gradient of the microbatch's mean loss."""

    receipt: SignedReceipt
    tensor: TensorHeader


class Refusal(wire.Message, frozen=True):
    """The typed answer to a tensor that is not used: which, and why."""

    microbatch: MicrobatchId
    direction: Direction
    reason: Reason


class Request(wire.Message, frozen=True):
    """A question that `Reply` with the same `number` answers. `body` is a message of the method's own type."""

    number: Count
    method: Annotated[str, msgspec.Meta(min_length=1, max_length=40)]
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE - 256)]


class Reply(wire.Message, frozen=True):
    """`refused` is None where the request was granted."""

    number: Count
    refused: Reason | None
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE - 256)]


class Farewell(wire.Message, frozen=True):
    """Last on a link: why its sender has no more to do with us. May come in place of a hello."""

    reason: Reason


_TYPES: Final[dict[Kind, type[wire.Message]]] = {
    Kind.HELLO: Hello,
    Kind.PING: Ping,
    Kind.PONG: Pong,
    Kind.CREDIT: Credit,
    Kind.ACTIVATION: Activation,
    Kind.GRADIENT: Gradient,
    Kind.REFUSAL: Refusal,
    Kind.REQUEST: Request,
    Kind.REPLY: Reply,
    Kind.FAREWELL: Farewell,
}
_KINDS: Final = {message: kind for kind, message in _TYPES.items()}


def frame_of(message: wire.Message, payload_size: int = 0) -> bytes:
    """Header and message; the payload follows as it is, uncopied."""
    body = wire.encode(message)
    return _HEADER.pack(_MAGIC, _KINDS[type(message)], len(body), payload_size) + body


def parse_header(header: bytes, max_tensor: int) -> tuple[Kind, int, int]:
    """(kind, bytes of message, bytes of payload). `max_tensor` bounds the payload of activations and gradients.

    Raises `ProtocolError` (malformed or oversized) before anything is allocated.
    """
    magic, number, message_size, payload_size = _HEADER.unpack(header)
    if magic != _MAGIC or number not in _TYPES:
        raise ProtocolError(Reason.MALFORMED, "not a frame")
    kind = Kind(number)
    if message_size > MAX_MESSAGE:
        raise ProtocolError(Reason.OVERSIZED, f"message of {message_size} bytes")
    if payload_size > _payload_limit(kind, max_tensor):
        raise ProtocolError(Reason.OVERSIZED, f"{kind.name} with {payload_size} bytes of payload")
    return kind, message_size, payload_size


def _payload_limit(kind: Kind, max_tensor: int) -> int:
    if kind in (Kind.ACTIVATION, Kind.GRADIENT):
        return max_tensor
    return MAX_CHUNK if kind in (Kind.REQUEST, Kind.REPLY) else 0


def parse_message(kind: Kind, body: bytes | memoryview) -> wire.Message:
    """Raises `ProtocolError` (malformed) unless `body` is a message of this kind."""
    return wire.decode(_TYPES[kind], body)
