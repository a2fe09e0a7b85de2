"""The DHT as a directory: who serves which stage, each record signed by the peer it speaks of.

Key `{run}/stage/{s}`, subkey PeerID, value a signed `StageRecord`, short expiry, refreshed. Without a validator
any peer could overwrite another's record; ours accepts only dictionary records of this run whose signer is the
subkey's peer and whose expiry is near the time at which the peer stated it. It acts on the nodes that install it,
and readers check again.
"""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum
from functools import lru_cache
from typing import Annotated

import msgspec
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils.serializer import MSGPackSerializer

from protocol import wire
from protocol.errors import ProtocolError, Reason
from protocol.host import Host
from protocol.identity import Identity, PeerId, check_signature
from protocol.invite import Address
from protocol.wire import Digest, Natural, PeerName, Signature, StageField

DOMAIN = b"sentinel/record/1"
LIFETIME = 30.0
"""Seconds until a record that is not refreshed is gone."""
_MAX_LIFETIME = 4 * LIFETIME
_CLOCK_SLACK = 30.0
_STORING = 5.0
"""Seconds that may pass between stating a record and storing it."""
_WITHIN = 15.0
"""Seconds for one word with the DHT: it asks several peers in turn, and who hangs takes 3 s each."""
MAX_RECORDS = 512
"""Records of one stage that a node of the DHT keeps."""
MAX_RECORD = 4096
_Rate = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class PeerState(StrEnum):
    """What a peer is doing, as it says itself."""

    JOINING = "joining"
    SERVING = "serving"
    WAITING = "waiting"
    FINISHED = "finished"
    LEAVING = "leaving"
    LEFT = "left"


class StageRecord(wire.Message, frozen=True):
    """`throughput`: tokens per second; `load`: microbatches held over `capacity`; `stated`: Unix time in seconds."""

    run: Digest
    peer: PeerName
    stage: StageField
    state: PeerState
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=8)]
    version: Natural
    digest: Digest
    throughput: _Rate
    load: _Rate
    capacity: Natural
    stated: Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class SignedRecord(wire.Message, frozen=True):
    record: StageRecord
    signature: Signature

    @classmethod
    def sign(cls, record: StageRecord, identity: Identity) -> SignedRecord:
        return cls(record, identity.sign(DOMAIN, wire.encode(record)))


def key_of(run: bytes, stage: int) -> str:
    return f"{run.hex()}/stage/{stage}"


def read_record(data: bytes, *, run: bytes, stage: int, peer: str, expires: float) -> StageRecord:
    """Check a record from the DHT. In order, each REJECT: size, form, run, stage, peer, expiry, signature.

    `expires` (Unix time) is not signed. Were it not tied to `stated`, which is, anybody could store an old record of
    a peer again with a later expiry, and the peer's own newer ones would count as older. Raises `ProtocolError`.
    """
    if len(data) > MAX_RECORD:
        raise ProtocolError(Reason.OVERSIZED, "record")
    signed = wire.decode(SignedRecord, data)
    record = signed.record
    if record.run != run:
        raise ProtocolError(Reason.FOREIGN_RUN)
    if record.stage != stage:
        raise ProtocolError(Reason.WRONG_STAGE, str(record.stage))
    if record.peer != peer:
        raise ProtocolError(Reason.WRONG_PEER, f"record of {record.peer} under {peer}")
    if expires > record.stated + LIFETIME + _STORING:
        raise ProtocolError(Reason.EXPIRED, f"stated {expires - record.stated:.0f} s before its expiry")
    _check_signature(record.peer, wire.encode(record), signed.signature)
    return record


@lru_cache(maxsize=MAX_RECORDS)
def _check_signature(peer: str, body: bytes, signature: bytes) -> None:
    """Once for each record: the DHT shows the same one again and again. What is raised is not remembered."""
    check_signature(peer, DOMAIN, body, signature)


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Decides what this node's share of the DHT stores and believes: only our run's stage records."""

    def __init__(self, run: bytes, stages: int) -> None:
        self._run = run
        # The DHT shows validators only the hash of a key.
        self._stage_of = {DHTID.generate(key_of(run, stage)).to_bytes(): stage for stage in range(stages)}

    def validate(self, record: DHTRecord) -> bool:
        stage = self._stage_of.get(record.key)
        if stage is None or record.expiration_time > time.time() + _MAX_LIFETIME:
            return False
        try:
            peer = MSGPackSerializer.loads(record.subkey)
            value = MSGPackSerializer.loads(record.value)
            if not isinstance(peer, str) or not isinstance(value, bytes):
                return False
            read_record(value, run=self._run, stage=stage, peer=peer, expires=record.expiration_time)
        except ProtocolError:
            return False
        except Exception:  # noqa: BLE001 - msgpack raises what it likes on hostile bytes; all of it means no
            return False
        return True


class _BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's storage keeps as many subkeys as anyone cares to sign, and identities cost nothing."""

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        held = self.get(key)
        records = held.value if held is not None else None
        if isinstance(records, DictionaryDHTValue) and len(records) >= MAX_RECORDS and subkey not in records:
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


class Directory:
    """Announce ourselves, and read who serves a stage."""

    def __init__(self, dht: DHTNode, run: bytes) -> None:
        self._dht, self._run = dht, run
        self._expiry = 0.0

    @classmethod
    async def join(cls, host: Host, run: bytes, stages: int, *, reader: bool = False) -> Directory:
        """A `reader` only looks things up: it keeps no share of the DHT."""
        node = await host.join_dht(RecordValidator(run, stages), client=reader)
        node.protocol.storage = _BoundedStorage()
        return cls(node, run)

    async def announce(self, record: StageRecord, identity: Identity) -> bool:
        """Store our record for `LIFETIME` seconds. False if no DHT node took it in time."""
        # A record replaces one that expires sooner, so ours must never shrink.
        self._expiry = max(time.time() + LIFETIME, self._expiry + 0.001)
        try:
            async with asyncio.timeout(_WITHIN):
                stored = await self._dht.store(
                    key_of(self._run, record.stage),
                    wire.encode(SignedRecord.sign(record, identity)),
                    expiration_time=self._expiry,
                    subkey=record.peer,
                )
        except TimeoutError:
            return False
        return bool(stored)

    async def peers(self, stage: int) -> dict[PeerId, StageRecord]:
        """The valid, unexpired records of a stage, those of peers that left excepted.

        Raises `ProtocolError` (timed_out) if the DHT does not answer.
        """
        try:
            async with asyncio.timeout(_WITHIN):
                found = await self._dht.get(key_of(self._run, stage), latest=True)
        except TimeoutError:
            raise ProtocolError(Reason.TIMED_OUT, f"looking up stage {stage}") from None
        if found is None or not isinstance(found.value, dict):
            return {}
        records: dict[PeerId, StageRecord] = {}
        for peer, entry in found.value.items():
            try:
                record = read_record(
                    entry.value, run=self._run, stage=stage, peer=peer, expires=entry.expiration_time
                )
            except (ProtocolError, TypeError, AttributeError):
                continue
            if record.state is not PeerState.LEFT and record.stated < time.time() + _CLOCK_SLACK:
                records[PeerId(peer)] = record
        return records
