"""The directory cannot be hijacked: neither by what a validator sees, nor over a DHT of real nodes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils.serializer import MSGPackSerializer
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import directory, wire
from protocol.directory import (
    LIFETIME,
    Directory,
    PeerState,
    RecordValidator,
    SignedRecord,
    StageRecord,
    key_of,
)
from protocol.host import Host
from protocol.identity import Identity
from tests.conftest import StartHost
from tests.protocol.strategies import IDENTITIES, mutated

RUN = b"r" * 32
HONEST, EVIL = IDENTITIES[:2]
VALIDATOR = RecordValidator(RUN, 3)


def make_record(identity: Identity = HONEST, **changes: Any) -> StageRecord:
    content: dict[str, Any] = {
        "run": RUN, "peer": identity.peer_id, "stage": 1, "state": PeerState.SERVING,
        "addresses": ("/ip4/127.0.0.1/tcp/1",), "version": 1, "digest": b"d" * 32, "throughput": 1.0,
        "load": 0.5, "capacity": 16, "stated": time.time(),
    }  # fmt: skip
    return StageRecord(**{**content, **changes})


def entry(
    record: StageRecord | None = None, *, signer: Identity = HONEST, stage: int = 1, run: bytes = RUN
) -> DHTRecord:
    """A DHT entry as a validator sees it; honest unless told otherwise."""
    record = record or make_record()
    value = wire.encode(SignedRecord.sign(record, signer))
    return DHTRecord(
        DHTID.generate(key_of(run, stage)).to_bytes(),
        MSGPackSerializer.dumps(record.peer),
        MSGPackSerializer.dumps(value),
        time.time() + LIFETIME,
    )


def test_a_peers_own_record_is_stored() -> None:
    assert VALIDATOR.validate(entry())


def plain_value() -> DHTRecord:
    return replace(entry(), subkey=MSGPackSerializer.dumps(None))


@pytest.mark.parametrize(
    "forged",
    [
        entry(signer=EVIL),
        replace(entry(), subkey=MSGPackSerializer.dumps(EVIL.peer_id)),
        plain_value(),
        replace(entry(), subkey=b""),
        replace(entry(), subkey=MSGPackSerializer.dumps(b"bytes")),
        replace(entry(), expiration_time=time.time() + 10 * LIFETIME),
        replace(entry(), expiration_time=float("inf")),
        entry(make_record(stated=time.time() - 60)),
        entry(run=b"x" * 32),
        entry(make_record(run=b"x" * 32)),
        entry(make_record(stage=2)),
        entry(stage=2),
        entry(stage=3),
        replace(entry(), key=b"any other key"),
        replace(entry(), value=b""),
        replace(entry(), value=MSGPackSerializer.dumps("text")),
        replace(entry(), value=MSGPackSerializer.dumps(b"\x91" * 3000)),
        replace(entry(), value=MSGPackSerializer.dumps(b"x" * 5000)),
        replace(entry(), value=b"\x91" * 100_000),
    ],
)
def test_what_is_not_a_peers_own_record_is_not_stored(forged: DHTRecord) -> None:
    assert not VALIDATOR.validate(forged)


def test_an_old_record_cannot_be_made_to_outlast_a_newer_one() -> None:
    old = entry(make_record(stated=time.time() - 20))
    assert not VALIDATOR.validate(replace(old, expiration_time=time.time() + LIFETIME))
    assert VALIDATOR.validate(replace(old, expiration_time=time.time() + LIFETIME - 20))


@given(st.data())
@settings(max_examples=60)
def test_no_damaged_record_is_stored_or_raises(data: st.DataObject) -> None:
    honest = entry()
    field = data.draw(st.sampled_from(["subkey", "value"]))
    damaged = data.draw(mutated(getattr(honest, field)))
    stored = VALIDATOR.validate(replace(honest, **{field: damaged}))
    assert not stored or damaged == getattr(honest, field)


# --- over a DHT ---


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(start_host: StartHost) -> list[tuple[Directory, Host, Identity]]:
    """Three nodes of one DHT, with their identities. The first is everybody's entry point."""
    first, identity = await start_host()
    seeds = tuple(await first.addresses())
    others = await asyncio.gather(start_host(seeds), start_host(seeds))
    places = [(first, identity), *others]
    return [(await Directory.join(host, RUN, 3), host, identity) for host, identity in places]


dht = pytest.mark.asyncio(loop_scope="module")


@dht
async def test_peers_find_each_other_and_nobody_hijacks_a_record(
    nodes: list[tuple[Directory, Host, Identity]],
) -> None:
    (honest, _, own), (reader, _, _), (evil, _, other) = nodes
    assert await honest.announce(make_record(own), own)
    assert set(await reader.peers(1)) == {own.peer_id}
    assert await reader.peers(0) == {}

    key, later = key_of(RUN, 1), time.time() + LIFETIME
    stolen = make_record(own, addresses=("/ip4/10.6.6.6/tcp/1",))
    old = wire.encode(SignedRecord.sign(make_record(own, version=0, stated=time.time() - 25), own))
    attempts = [
        ("another's key", own.peer_id, wire.encode(SignedRecord.sign(stolen, other)), later),
        ("own record under another's name", own.peer_id, signed_by(other), later),
        ("an old record again", own.peer_id, old, time.time() + 3 * LIFETIME),
        ("a far expiry", other.peer_id, signed_by(other), time.time() + 1e6),
        ("a plain value", None, signed_by(other), time.time() + 3 * LIFETIME),
        ("noise", own.peer_id, b"noise", later),
        ("another type", own.peer_id, ["a", "list"], later),
    ]
    # The attacker's own node checks nothing.
    evil._dht.protocol.record_validator = None
    for name, subkey, value, expires in attempts:
        await evil._dht.store(key, value, expires, subkey=subkey, exclude_self=True)
        found = await reader.peers(1)
        assert set(found) == {own.peer_id}, name
        assert found[own.peer_id].version == 1, name
        assert found[own.peer_id].addresses == ("/ip4/127.0.0.1/tcp/1",), name
    # And the honest one can still say what is new.
    assert await honest.announce(make_record(own, version=2), own)
    assert (await reader.peers(1))[own.peer_id].version == 2


def signed_by(identity: Identity) -> bytes:
    return wire.encode(SignedRecord.sign(make_record(identity), identity))


@dht
async def test_a_peer_that_left_is_not_listed(nodes: list[tuple[Directory, Host, Identity]]) -> None:
    (one, _, own), (reader, _, _), _ = nodes
    assert await one.announce(make_record(own, stage=2), own)
    assert set(await reader.peers(2)) == {own.peer_id}
    left = make_record(own, stage=2, state=PeerState.LEFT)
    assert await one.announce(left, own)
    assert await reader.peers(2) == {}


@dht
async def test_a_node_keeps_a_bounded_number_of_records(
    nodes: list[tuple[Directory, Host, Identity]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MAX_RECORDS", 3)
    _, _, (one, _, _) = nodes
    storage, key = directory._BoundedStorage(), DHTID.generate("key")
    later = time.time() + 10
    names = [f"peer {number}" for number in range(9)]
    assert [storage.store_subkey(key, name, b"value", later) for name in names] == [True] * 3 + [False] * 6
    assert storage.store_subkey(key, names[0], b"newer", later + 1)
    assert len(storage.get(key).value) == 3
    assert isinstance(one._dht.protocol.storage, directory._BoundedStorage)


def test_records_of_the_largest_size_fit() -> None:
    largest = make_record(addresses=("/" + "a" * 299,) * 8, version=2**53, capacity=2**53)
    assert len(wire.encode(SignedRecord.sign(largest, HONEST))) < directory.MAX_RECORD
    assert msgspec.structs.asdict(largest)
