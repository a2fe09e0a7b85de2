"""Hypothesis strategies for every wire type, derived from the annotations that decoding enforces."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

import protocol.directory
import protocol.invite
import protocol.messages
import protocol.reports
import protocol.reputation
import protocol.requests
import protocol.vote_file  # noqa: F401 - the imports define the types that `all_types` finds
from protocol import wire
from protocol.identity import Identity

IDENTITIES = [Identity.generate() for _ in range(4)]
_ADDRESSES = ["/ip4/127.0.0.1/tcp/31337", "/ip6/::1/udp/1/quic-v1", "/" + "a" * 299]
_FEW = 6


def all_types() -> list[type[wire.Message]]:
    """Every message type that this project puts on a wire."""
    found, queue = [], [wire.Message]
    while queue:
        children = queue.pop().__subclasses__()
        found += [child for child in children if child.__module__.startswith("protocol.")]
        queue += children
    return sorted(found, key=lambda kind: kind.__name__)


@cache
def messages_of(kind: type[wire.Message]) -> st.SearchStrategy[Any]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return st.builds(kind, **{field.name: _of(field.type) for field in info.fields})


def _of(info: inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case inspect.Metadata(type=inner):
            return _of(inner)
        case inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case inspect.FloatType(ge=low, le=high):
            return st.floats(low, high, allow_nan=False)
        case inspect.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=min(high or 256, max(low or 0, 256)))
        case inspect.StrType(pattern=pattern) if pattern and pattern.startswith("^12D3"):
            return st.sampled_from([one.peer_id for one in IDENTITIES])
        case inspect.StrType(pattern="^/"):
            return st.sampled_from(_ADDRESSES)
        case inspect.StrType(min_length=low, max_length=high):
            return st.text(min_size=low or 0, max_size=high or 20)
        case inspect.EnumType(cls=enum):
            return st.sampled_from(enum)
        case inspect.NoneType():
            return st.none()
        case inspect.UnionType(types=types):
            return st.one_of(*map(_of, types))
        case inspect.VarTupleType(item_type=item, min_length=low, max_length=high):
            size = max(low or 0, min(high or _FEW, _FEW))
            return st.lists(_of(item), min_size=low or 0, max_size=size).map(tuple)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_of(key), _of(value), max_size=_FEW)
        case inspect.StructType(cls=kind):
            return messages_of(kind)
    raise NotImplementedError(f"a strategy for {info}")


def any_message() -> st.SearchStrategy[wire.Message]:
    return st.sampled_from(all_types()).flatmap(messages_of)


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """A few changed, missing, added or moved bytes."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "drop", "insert", "cut", "repeat"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "drop":
                del data[at : at + draw(st.integers(1, 8))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del data[at:]
            case "repeat":
                data[at:at] = data[: draw(st.integers(0, 64))]
    return bytes(data)


# What a decoder of msgpack might trip over: endless nesting, lengths of gigabytes, extensions, half a number.
NASTY = [
    b"",
    b"\x91" * 60_000,
    b"\x81\xa0" * 20_000,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xcb\x7f\xf8",
    b"\xc1",
    b"\xd9\x02\xff\xfe",
    b"\x9f" + b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00" * 15,
    *(bytes([0x90 + size]) + b"\xdd\xff\xff\xff\xff" * size for size in range(1, 14)),
    *(bytes([0x90 + size]) + b"\xc6\xff\xff\xff\xff" * size for size in range(1, 14)),
]


def plain(message: Any) -> Any:
    """A message as the lists and numbers that it is on the wire, to change one of them."""
    return msgspec.msgpack.decode(wire.encode(message))
