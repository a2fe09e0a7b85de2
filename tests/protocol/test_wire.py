"""Every wire type: decoding is the inverse of encoding, and refuses anything else with the protocol's own error."""

from __future__ import annotations

import math
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages, wire
from protocol.directory import StageRecord
from protocol.errors import ProtocolError, Reason
from protocol.messages import HEADER_SIZE, MAX_CHUNK, MAX_MESSAGE, Kind
from protocol.receipts import MicrobatchId
from protocol.requests import Member
from tests.protocol.strategies import NASTY, all_types, any_message, messages_of, mutated, plain

MAX_TENSOR = 1 << 20


def refuses_or_reads(kind: type[wire.Message], data: bytes) -> None:
    """Either the protocol's error, or a message that satisfies its own bounds."""
    try:
        message = wire.decode(kind, data)
    except ProtocolError as error:
        assert error.reason is Reason.MALFORMED
        assert len(error.detail) <= 200
    else:
        assert wire.decode(kind, wire.encode(message)) == message


def test_all_wire_types_are_covered() -> None:
    names = {kind.__name__ for kind in all_types()}
    assert {kind.__name__ for kind in messages._KINDS} <= names
    assert {
        "Receipt", "SignedReceipt", "Progress", "Metrics", "StageRecord", "SignedRecord", "Invite", "TensorHeader",
        "RoundOpen", "RoundHolding", "RoundCommit", "RoundPart", "StateDescription", "StateChunk", "Nothing",
        "Vote", "SignedVote", "Contradiction", "VoteBundle", "VotesWanted", "VotesHeld", "VoteArchive",
        "Reputation", "SignedReputation",
    } <= names  # fmt: skip


@pytest.mark.parametrize("kind", all_types(), ids=lambda kind: kind.__name__)
def test_decode_inverts_encode(kind: type[wire.Message]) -> None:
    @given(messages_of(kind))
    @settings(max_examples=20)
    def check(message: wire.Message) -> None:
        encoded = wire.encode(message)
        assert wire.decode(kind, encoded) == message
        assert wire.encode(wire.decode(kind, encoded)) == encoded

    check()


@pytest.mark.parametrize("kind", all_types(), ids=lambda kind: kind.__name__)
def test_nothing_but_a_protocol_error_comes_of_hostile_bytes(kind: type[wire.Message]) -> None:
    for data in NASTY:
        refuses_or_reads(kind, data)

    @given(st.binary(max_size=300))
    @settings(max_examples=20)
    def check_random(data: bytes) -> None:
        refuses_or_reads(kind, data)

    @given(st.data(), messages_of(kind))
    @settings(max_examples=20)
    def check_mutated(data: st.DataObject, message: wire.Message) -> None:
        refuses_or_reads(kind, data.draw(mutated(wire.encode(message))))

    check_random()
    check_mutated()


@given(any_message())
@settings(max_examples=40)
def test_a_message_cut_short_or_followed_by_more_is_refused(message: wire.Message) -> None:
    encoded = wire.encode(message)
    for data in (encoded[:-1], encoded + b"\x00", encoded + encoded):
        with pytest.raises(ProtocolError):
            wire.decode(type(message), data)


@given(any_message())
@settings(max_examples=40)
def test_no_more_and_no_fewer_fields_and_no_other_types(message: wire.Message) -> None:
    fields = plain(message)
    wrong = [[*fields, 0], {"a": 1}, 7, None]
    wrong += [[*fields[:at], {"a": 1.5}, *fields[at + 1 :]] for at in range(len(fields))]
    for content in wrong:
        if isinstance(content, list) and content == fields:
            continue
        try:
            decoded = wire.decode(type(message), msgspec.msgpack.encode(content))
        except ProtocolError:
            continue
        # Only a field that is a dictionary may be one.
        assert type(message).__name__ == "Metrics"
        assert decoded != message


@given(messages_of(StageRecord))
@settings(max_examples=5)
def test_figures_are_finite_and_not_negative(record: StageRecord) -> None:
    names = [field.name for field in msgspec.structs.fields(StageRecord)]
    for name, value in product(("throughput", "load", "stated"), (math.nan, math.inf, -1.0)):
        fields = plain(record)
        fields[names.index(name)] = value
        with pytest.raises(ProtocolError):
            wire.decode(StageRecord, msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "name", ["12D3KooW" + "a" * 43 + "\n", "12D3KooW" + "0" * 44, "12D3KooWa", "Qm" + "a" * 50]
)
def test_peer_names_are_of_ed25519_identities(name: str) -> None:
    for kind in (MicrobatchId, Member):
        with pytest.raises(ProtocolError):
            wire.decode(kind, msgspec.msgpack.encode([name, 1]))


# --- frame headers ---


@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE))
@settings(max_examples=40)
def test_any_16_bytes_are_a_bounded_frame_or_refused(header: bytes) -> None:
    check_header(header)


@given(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_sizes_in_a_header_are_bounded_by_kind(kind: Kind, message: int, payload: int) -> None:
    check_header(messages._HEADER.pack(messages._MAGIC, kind, message, payload))


def check_header(header: bytes) -> None:
    try:
        kind, message, payload = messages.parse_header(header, MAX_TENSOR)
    except ProtocolError as error:
        assert error.reason in (Reason.MALFORMED, Reason.OVERSIZED)
    else:
        assert message <= MAX_MESSAGE
        limits = dict.fromkeys((Kind.ACTIVATION, Kind.GRADIENT), MAX_TENSOR)
        limits |= dict.fromkeys((Kind.REQUEST, Kind.REPLY), MAX_CHUNK)
        assert payload <= limits.get(kind, 0)
