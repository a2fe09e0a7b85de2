"""An invite: the one string a volunteer needs. Seed addresses, the run id and the operator's key."""

from __future__ import annotations

import base64
import re
from typing import Annotated

import msgspec
from blake3 import blake3

from protocol import wire
from protocol.errors import ProtocolError, UserError
from protocol.wire import Digest, PeerName

_PREFIX = "sentinel1-"
_OTHER_VERSION = re.compile(r"sentinel\d+-")
_CHECKSUM = 4
MAX_SEEDS = 16
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=300, pattern="^/")]


class Invite(wire.Message, frozen=True):
    """`run` is the manifest's hash, so whoever serves the manifest cannot alter it."""

    run: Digest
    operator: PeerName
    seeds: Annotated[tuple[Address, ...], msgspec.Meta(min_length=1, max_length=MAX_SEEDS)]

    def __str__(self) -> str:
        body = wire.encode(self)
        return _PREFIX + base64.urlsafe_b64encode(body + blake3(body).digest(_CHECKSUM)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Raises `UserError` for anything but a whole, unaltered invite."""
        text = "".join(text.split())
        remedy = "Copy the whole line that `sentinel-node bootstrap` printed"
        if not text.startswith(_PREFIX):
            if _OTHER_VERSION.match(text):
                raise _other_version()
            raise UserError(f"This is not an invite: it does not begin with {_PREFIX}", remedy)
        encoded = text.removeprefix(_PREFIX)
        try:
            data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        except ValueError:
            raise UserError("The invite has characters that no invite has", remedy) from None
        body, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if blake3(body).digest(_CHECKSUM) != checksum:
            raise UserError("The invite is cut short or mistyped (its checksum is wrong)", remedy)
        try:
            return wire.decode(cls, body)
        except ProtocolError:
            raise _other_version() from None


def _other_version() -> UserError:
    return UserError(
        "The invite was made by another version of sentinel-node",
        "Install the version that the operator runs",
    )
