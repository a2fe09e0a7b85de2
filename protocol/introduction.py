"""How a peer with an invite gets the run's manifest: asked of a seed, checked against the invite."""

from __future__ import annotations

from protocol import wire
from protocol.codec import Payload
from protocol.errors import BannedError, ProtocolError, Reason, UserError
from protocol.host import Host
from protocol.identity import PeerId
from protocol.invite import Invite
from protocol.links import Answer, Link, Method, Switchboard
from protocol.manifest import SignedManifest
from protocol.messages import MAX_CHUNK, Activation, Gradient
from protocol.requests import MANIFEST, Nothing

_TIMEOUT = 10.0
_ASK = (
    "Get a newer invite, or ask the operator whether `sentinel-node bootstrap` runs with this run's manifest"
)


class Deaf:
    """The owner of a switchboard that takes requests and no tensors."""

    def on_link_up(self, link: Link) -> None: ...

    def on_link_down(self, link: Link) -> None: ...

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None:
        raise ProtocolError(Reason.WRONG_STAGE, "tensors are not taken here")

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None: ...


def manifest_method(signed: SignedManifest) -> Method:
    """Answers `manifest` with the manifest's TOML as payload."""
    text = memoryview(signed.to_toml().encode())
    assert len(text) <= MAX_CHUNK

    async def answer(link: Link, body: bytes, payload: memoryview) -> Answer:
        wire.decode(Nothing, body)
        return b"", text

    return answer


async def fetch_manifest(host: Host, invite: Invite) -> SignedManifest:
    """The manifest that the invite names, from the first seed that gives it. Raises `UserError` if none does, and
    `BannedError` if a seed says that we are banned."""
    switchboard = Switchboard(host, invite.run, stage=-1, owner=Deaf())
    await switchboard.start(accept=False)
    problem = UserError("The invite names no seed", _ASK)
    try:
        for seed in invite.seeds:
            try:
                return await _ask(switchboard, invite, seed)
            except UserError as error:
                problem = error
    finally:
        await switchboard.stop()
    raise problem


async def _ask(switchboard: Switchboard, invite: Invite, seed: str) -> SignedManifest:
    _, _, peer = seed.rpartition("/p2p/")
    try:
        link = await switchboard.connect(PeerId(peer), [seed])
        _, text = await link.request(MANIFEST, Nothing(), timeout=_TIMEOUT)
    except ProtocolError as error:
        if error.reason is Reason.BANNED:
            raise BannedError(f"This peer, {switchboard.host.peer_id}, is banned from the run") from None
        raise UserError(
            f"Seed {peer} does not serve the run of this invite ({error.reason.value})", _ASK
        ) from None
    signed = SignedManifest.parse(bytes(text).decode(errors="replace"), f"seed {peer}")
    if signed.run != invite.run or signed.operator != invite.operator:
        raise UserError(f"Seed {peer} serves another manifest than the invite names", _ASK)
    return signed
