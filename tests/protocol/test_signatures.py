"""Identities, signatures, receipts and their chain: nothing that was altered or belongs elsewhere passes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import directory, manifest, receipts, wire
from protocol.errors import ProtocolError, Reason, UserError
from protocol.identity import Identity, PeerId, check_signature, peer_id_of, public_key_of
from protocol.receipts import Direction, MicrobatchId, Receipt, SignedReceipt, check_hop, is_chained
from tests.protocol.strategies import IDENTITIES, messages_of

HEAD, MIDDLE, TAIL, STRANGER = IDENTITIES
RUN = b"r" * 32
DOMAINS = [receipts.DOMAIN, directory.DOMAIN, manifest.DOMAIN]


def make_receipt(**changes: Any) -> Receipt:
    content: dict[str, Any] = {
        "run": RUN,
        "microbatch": MicrobatchId(HEAD.peer_id, 5),
        "direction": Direction.ACTIVATION,
        "stage": 1,
        "version": 3,
        "input": b"i" * 32,
        "output": b"o" * 32,
        "sender": MIDDLE.peer_id,
        "recipient": TAIL.peer_id,
    }
    return Receipt(**{**content, **changes})


def refusal(signed: SignedReceipt) -> Reason | None:
    """Why a tail that listens to the middle refuses this receipt; None if it does not."""
    try:
        check_hop(signed, run=RUN, sender=MIDDLE.peer_id, recipient=TAIL.peer_id, stage=1)
    except ProtocolError as error:
        return error.reason
    return None


# --- signatures ---


@given(st.binary(max_size=200), st.integers(0, 2**16), st.integers(0, 7))
@settings(max_examples=40)
def test_any_flipped_bit_breaks_a_signature(body: bytes, place: int, bit: int) -> None:
    signature = HEAD.sign(DOMAINS[0], body)
    check_signature(HEAD.peer_id, DOMAINS[0], body, signature)
    for changes_body in (True, False):
        target = bytearray(body if changes_body else signature)
        if not target:
            continue
        target[place % len(target)] ^= 1 << bit
        altered = (bytes(target), signature) if changes_body else (body, bytes(target))
        with pytest.raises(ProtocolError) as caught:
            check_signature(HEAD.peer_id, DOMAINS[0], *altered)
        assert caught.value.reason is Reason.BAD_SIGNATURE


def test_a_signature_holds_in_its_own_domain_only() -> None:
    assert len(set(DOMAINS)) == len(DOMAINS)
    signature = HEAD.sign(DOMAINS[0], b"body")
    for domain, body in [(DOMAINS[1], b"body"), (DOMAINS[2], b"body"), (b"sentinel", b"/receipt/1\x00body")]:
        with pytest.raises(ProtocolError):
            check_signature(HEAD.peer_id, domain, body, signature)


def test_a_signature_holds_for_its_signer_only() -> None:
    with pytest.raises(ProtocolError):
        check_signature(STRANGER.peer_id, DOMAINS[0], b"body", HEAD.sign(DOMAINS[0], b"body"))


@given(st.binary(max_size=80))
@settings(max_examples=40)
def test_no_bytes_are_a_signature_by_chance(signature: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_signature(HEAD.peer_id, DOMAINS[0], b"body", signature)
    assert caught.value.reason is Reason.BAD_SIGNATURE


@given(st.text(max_size=80))
@settings(max_examples=60)
def test_a_peer_id_is_refused_unless_it_embeds_a_key(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        public_key_of(name)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "name",
    [
        "1" * 300_000,
        "z" * 300_000,
        "z" * 52,
        "12D3KooW" + "a" * 44,
        HEAD.peer_id + " ",
        "\n" + HEAD.peer_id[:-1],
    ],
)
def test_a_peer_id_of_another_form_is_refused_at_once(name: str) -> None:
    with pytest.raises(ProtocolError):
        check_signature(name, DOMAINS[0], b"", bytes(64))


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=40)
def test_any_key_has_a_peer_id_that_the_wire_takes(key: bytes) -> None:
    peer = peer_id_of(key)
    assert public_key_of(peer) == key
    microbatch = MicrobatchId(peer, 1)
    assert wire.decode(MicrobatchId, wire.encode(microbatch)) == microbatch


# --- identities on disk ---


def test_an_identity_survives_its_file_and_is_shown_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "node.key"
    HEAD.save(path)
    assert Identity.load(path).peer_id == Identity.load_or_create(path).peer_id == HEAD.peer_id
    check_signature(HEAD.peer_id, DOMAINS[0], b"body", Identity.load(path).sign(DOMAINS[0], b"body"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert HEAD._key.private_bytes_raw().hex() not in repr(HEAD)
    with pytest.raises(UserError):
        STRANGER.save(path)


@given(st.binary(max_size=120))
@settings(max_examples=40)
def test_a_key_file_of_anything_else_is_the_users_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("key") / "node.key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(UserError):
        Identity.load(path)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    HEAD.save(path)
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        Identity.load(path)


# --- receipts ---


def test_a_receipt_of_this_hop_passes() -> None:
    assert refusal(SignedReceipt.sign(make_receipt(), MIDDLE)) is None


@pytest.mark.parametrize(
    "changes, signer, reason",
    [
        ({"run": b"x" * 32}, MIDDLE, Reason.FOREIGN_RUN),
        ({"sender": STRANGER.peer_id}, STRANGER, Reason.WRONG_PEER),
        ({"recipient": STRANGER.peer_id}, MIDDLE, Reason.WRONG_PEER),
        ({"stage": 0}, MIDDLE, Reason.WRONG_STAGE),
        ({"stage": 2}, MIDDLE, Reason.WRONG_STAGE),
        ({}, STRANGER, Reason.BAD_SIGNATURE),
    ],
)
def test_a_receipt_of_another_hop_is_refused(
    changes: dict[str, Any], signer: Identity, reason: Reason
) -> None:
    assert refusal(SignedReceipt.sign(make_receipt(**changes), signer)) is reason


@dataclass(frozen=True)
class Change:
    field: str
    value: Any


CHANGES = [
    Change("microbatch", MicrobatchId(HEAD.peer_id, 6)),
    Change("microbatch", MicrobatchId(HEAD.peer_id, 5, 1)),
    Change("microbatch", MicrobatchId(STRANGER.peer_id, 5)),
    Change("direction", Direction.GRADIENT),
    Change("version", 4),
    Change("input", b"x" * 32),
    Change("output", b"x" * 32),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.field)
def test_any_field_changed_after_signing_is_noticed(change: Change) -> None:
    signed = SignedReceipt.sign(make_receipt(), MIDDLE)
    altered = msgspec.structs.replace(signed.receipt, **{change.field: change.value})
    assert refusal(SignedReceipt(altered, signed.signature)) is Reason.BAD_SIGNATURE


def test_every_field_is_covered_by_a_check_or_by_the_signature() -> None:
    checked = {"run", "sender", "recipient", "stage"}
    assert checked | {change.field for change in CHANGES} == set(Receipt.__struct_fields__)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60)
def test_any_byte_changed_on_the_wire_is_noticed(place: int, change: int) -> None:
    data = bytearray(wire.encode(SignedReceipt.sign(make_receipt(), MIDDLE)))
    data[place % len(data)] ^= change
    try:
        signed = wire.decode(SignedReceipt, bytes(data))
    except ProtocolError:
        return
    assert refusal(signed) is not None


@given(messages_of(SignedReceipt))
@settings(max_examples=60)
def test_no_receipt_passes_by_chance(signed: SignedReceipt) -> None:
    assert refusal(signed) is not None


def test_receipts_of_a_path_chain() -> None:
    first = make_receipt(stage=0, sender=HEAD.peer_id, recipient=MIDDLE.peer_id, output=b"1" * 32)
    second = make_receipt(input=b"1" * 32)
    assert is_chained(first, second)
    assert not is_chained(second, first)
    for changes in (
        {"input": b"2" * 32},
        {"run": b"x" * 32},
        {"microbatch": MicrobatchId(HEAD.peer_id, 6)},
        {"microbatch": MicrobatchId(HEAD.peer_id, 5, 1)},
        {"direction": Direction.GRADIENT},
        {"sender": STRANGER.peer_id},
    ):
        assert not is_chained(first, make_receipt(**{"input": b"1" * 32, **changes}))


# --- records ---


def make_record(**changes: Any) -> directory.StageRecord:
    content: dict[str, Any] = {
        "run": RUN, "peer": MIDDLE.peer_id, "stage": 1, "state": directory.PeerState.SERVING,
        "addresses": ("/ip4/127.0.0.1/tcp/1",), "version": 1, "digest": b"d" * 32, "throughput": 1.0,
        "load": 0.5, "capacity": 16, "stated": time.time(),
    }  # fmt: skip
    return directory.StageRecord(**{**content, **changes})


def read(data: bytes, peer: PeerId = MIDDLE.peer_id, expires: float | None = None) -> directory.StageRecord:
    later = time.time() + directory.LIFETIME if expires is None else expires
    return directory.read_record(data, run=RUN, stage=1, peer=peer, expires=later)


def test_a_record_of_the_peer_itself_is_believed() -> None:
    record = make_record()
    assert read(wire.encode(directory.SignedRecord.sign(record, MIDDLE))) == record


@pytest.mark.parametrize(
    "changes, signer, reason",
    [
        ({"run": b"x" * 32}, MIDDLE, Reason.FOREIGN_RUN),
        ({"stage": 2}, MIDDLE, Reason.WRONG_STAGE),
        ({"peer": STRANGER.peer_id}, STRANGER, Reason.WRONG_PEER),
        ({"stated": 0.0}, MIDDLE, Reason.EXPIRED),
        ({}, STRANGER, Reason.BAD_SIGNATURE),
        ({"addresses": ("/" + "a" * 299,) * 8, "capacity": 2**53}, STRANGER, Reason.BAD_SIGNATURE),
    ],
)
def test_other_records_are_refused(changes: dict[str, Any], signer: Identity, reason: Reason) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(wire.encode(directory.SignedRecord.sign(make_record(**changes), signer)))
    assert caught.value.reason is reason


def test_a_record_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(ProtocolError) as caught:
        read(b"\x91" * (directory.MAX_RECORD + 1))
    assert caught.value.reason is Reason.OVERSIZED
