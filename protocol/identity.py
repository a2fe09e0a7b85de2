"""Ed25519 identities: one key file is a peer's name on the network and its signature.

A libp2p PeerID of an Ed25519 key embeds the public key (identity multihash), so a signature is checked
with nothing but the PeerID (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NewType

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hivemind.proto import crypto_pb2

from protocol.errors import ProtocolError, Reason, UserError

PeerId = NewType("PeerId", str)
"""A libp2p PeerID in base58; for Ed25519 keys 52 characters that begin with `12D3KooW`."""

# Identity multihash (code 0, 36 bytes) of the libp2p PublicKey protobuf (type Ed25519, 32 bytes of key).
_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"
_PEER_ID_LENGTH = 52


def peer_id_of(public_key: bytes) -> PeerId:
    """The PeerID of a raw 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


@lru_cache(maxsize=4096)
def _verifying_key(peer: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key_of(peer))


def public_key_of(peer: str) -> bytes:
    """The raw 32-byte public key inside a PeerID. Raises `ProtocolError` (malformed) for any other kind of id."""
    if len(peer) != _PEER_ID_LENGTH:  # Decoding takes time that grows with the square of the length.
        raise ProtocolError(Reason.MALFORMED, "PeerID of another length than an Ed25519 key's")
    try:
        raw = base58.b58decode(peer)
    except ValueError:
        raise ProtocolError(Reason.MALFORMED, "PeerID is not base58") from None
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        raise ProtocolError(Reason.MALFORMED, "PeerID does not embed an Ed25519 key")
    return bytes(raw[len(_PEER_ID_PREFIX) :])


def check_signature(peer: str, domain: bytes, body: bytes, signature: bytes) -> None:
    """Raises `ProtocolError` (bad_signature) unless `peer` signed `body` in this `domain`."""
    try:
        _verifying_key(peer).verify(signature, domain + b"\x00" + body)
    except (InvalidSignature, ValueError):
        raise ProtocolError(Reason.BAD_SIGNATURE, f"not signed by {peer} as {domain.decode()}") from None


@dataclass(frozen=True)
class Identity:
    """A private key and the PeerID it gives. Never logged: `repr` shows the PeerID alone."""

    _key: Ed25519PrivateKey
    peer_id: PeerId

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def sign(self, domain: bytes, body: bytes) -> bytes:
        """64 bytes of Ed25519 signature over `domain`, a zero byte and `body`."""
        return self._key.sign(domain + b"\x00" + body)

    @classmethod
    def generate(cls) -> Identity:
        return cls._of(Ed25519PrivateKey.generate())

    @classmethod
    def _of(cls, key: Ed25519PrivateKey) -> Identity:
        return cls(key, peer_id_of(key.public_key().public_bytes_raw()))

    def save(self, path: Path) -> None:
        """Write the libp2p key file that p2pd reads, mode 0600 from its first byte; an existing file is kept."""
        data = self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()
        content = crypto_pb2.PrivateKey(key_type=crypto_pb2.Ed25519, data=data).SerializeToString()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
            except BaseException:
                path.unlink()  # Half a key would be in the way of the next start.
                raise
        except FileExistsError:
            raise UserError(f"{path} exists already", "Name another file, or move this key away") from None
        except OSError as error:
            raise UserError(
                f"Cannot write the key file {path}: {error.strerror}", "Free space, or name a writable place"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Raises `UserError` if the file cannot be read, is no Ed25519 key, or is readable by others."""
        try:
            if path.stat().st_mode & 0o077:
                raise UserError(f"The key file {path} can be read by others", f"Run: chmod 600 {path}")
            key = crypto_pb2.PrivateKey.FromString(path.read_bytes())
        except OSError as error:
            raise UserError(f"Cannot read the key file {path}: {error.strerror}", "Check the path") from None
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - protobuf raises several kinds for bytes that are no key
            raise UserError(
                f"{path} is not a key file ({type(error).__name__})", "Name another file"
            ) from None
        if key.key_type != crypto_pb2.Ed25519 or len(key.data) != 64:
            raise UserError(f"{path} holds no Ed25519 key", "Remove --identity to have one made") from None
        return cls._of(Ed25519PrivateKey.from_private_bytes(key.data[:32]))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity
