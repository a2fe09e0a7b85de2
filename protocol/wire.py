"""Typed messages as bytes: msgpack arrays, strictly checked, one canonical encoding each.

Messages are frozen `msgspec.Struct`s in array layout. Decoding validates every type and bound that the
annotations state, and raises nothing but `ProtocolError` whatever the bytes are.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec

from protocol.errors import ProtocolError, Reason


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of everything that crosses the wire."""


M = TypeVar("M", bound=Message)

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
PeerName = Annotated[
    str, msgspec.Meta(min_length=52, max_length=52, pattern="^12D3KooW[1-9A-HJ-NP-Za-km-z]+\\Z")
]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
StageField = Annotated[int, msgspec.Meta(ge=0, le=4095)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]

_encoder = msgspec.msgpack.Encoder()


@cache
def _decoder(kind: type[Message]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def encode(message: Message) -> bytes:
    """The canonical bytes of a message: equal messages have equal bytes, so they can be signed and hashed."""
    return _encoder.encode(message)


def decode(kind: type[M], data: bytes | memoryview) -> M:
    """The message of type `kind` that `data` holds. Raises `ProtocolError` (malformed) for anything else."""
    try:
        message: M = _decoder(kind).decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ProtocolError(Reason.MALFORMED, f"{kind.__name__}: {error}"[:200]) from None
    return message
