"""How a peer with an invite gets the run's manifest: asked of a seed, checked against the invite."""

from __future__ import annotations

from protocol import wire
from protocol.errors import ProtocolError, UserError
from protocol.host import Host
from protocol.identity import PeerId
from protocol.invite import Invite
from protocol.links import Answer, Link, Method, Switchboard
from protocol.manifest import SignedManifest
from protocol.messages import MAX_CHUNK
from protocol.requests import MANIFEST, Nothing

_TIMEOUT = 10.0


class Deaf:
    """The owner of a switchboard that takes requests and no tensors."""

    def on_link_up(self, link: Link) -> None: ...

    def on_link_down(self, link: Link) -> None: ...

    def on_message(self, link: Link, message: wire.Message, payload: memoryview) -> None: ...


def manifest_method(signed: SignedManifest) -> Method:
    """Answers `manifest` with the manifest's TOML as payload."""
    text = memoryview(signed.to_toml().encode())
    assert len(text) <= MAX_CHUNK

    async def answer(link: Link, body: bytes, payload: memoryview) -> Answer:
        wire.decode(Nothing, body)
        return b"", text

    return answer


async def fetch_manifest(host: Host, invite: Invite) -> SignedManifest:
    """The manifest that the invite names, from the first seed that gives it. Raises `UserError`."""
    switchboard = Switchboard(host, invite.run, stage=-1, max_tensor=0, owner=Deaf())
    await switchboard.start(accept=False)
    try:
        for seed in invite.seeds:
            _, _, peer = seed.rpartition("/p2p/")
            try:
                link = await switchboard.connect(PeerId(peer), [seed])
                _, text = await link.request(MANIFEST, Nothing(), timeout=_TIMEOUT)
                signed = SignedManifest.parse(bytes(text).decode(errors="replace"), f"seed {peer}")
            except ProtocolError:
                continue
            if signed.run != invite.run or signed.operator != invite.operator:
                raise UserError(
                    "The seed serves another manifest than the invite names",
                    "Ask the operator for a newer invite",
                )
            return signed
    finally:
        await switchboard.stop()
    raise UserError(
        "No seed of the invite serves its manifest",
        "Ask the operator whether `sentinel-node bootstrap` runs with this run's manifest, or get a newer invite",
    )
