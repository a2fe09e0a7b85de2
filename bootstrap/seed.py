"""The seed peer: entry point to the DHT, relay for peers behind NAT, server of the signed manifest and of the votes.

It serves no stage and sees no tensor. A run that has begun goes on without it; only joining needs a seed. It answers
those who are banned too: whom else should they ask why?
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from protocol.ballots import Ballots
from protocol.directory import Directory
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import Deaf, manifest_method
from protocol.invite import MAX_SEEDS, Invite
from protocol.links import Switchboard
from protocol.manifest import SignedManifest
from protocol.reports import metrics_topic, progress_topic
from protocol.requests import MANIFEST
from protocol.vote_set import VoteSet

log = structlog.get_logger("bootstrap")


class Seed:
    """`start`, hand out `invite`, `stop` on every path."""

    def __init__(
        self,
        signed: SignedManifest,
        identity: Path,
        listen: Sequence[str] = DEFAULT_LISTEN,
        others: Sequence[str] = (),
    ) -> None:
        """`others`: addresses of seeds of this run that are up already."""
        self._signed, self._identity_path, self._listen = signed, identity, listen
        self._others = tuple(others)

    async def start(self) -> Invite:
        """Raises `UserError` if an address cannot be listened on, or none of the other seeds can be reached."""
        Identity.load_or_create(self._identity_path)
        run, stages = self._signed.run, self._signed.manifest.stages.count
        self.host = await Host.start(self._identity_path, listen=self._listen, seeds=self._others, relay=True)
        await Directory.join(self.host, run, stages)
        self._switchboard = Switchboard(self.host, run, stage=-1, owner=Deaf())
        self._switchboard.methods[MANIFEST] = manifest_method(self._signed)
        self._ballots = Ballots(
            self._switchboard,
            VoteSet(self._signed.electorate),
            seeds=self._others,
            path=self._identity_path.with_suffix(".votes"),
        )
        await self._switchboard.start()
        await self._ballots.start()
        self._keeping = asyncio.create_task(self._ballots.run())
        # Gossip crosses from peer to peer only over subscribers: until peers know each other, that is us.
        for topic in (metrics_topic(run), *(progress_topic(run, stage) for stage in range(stages))):
            await self.host.subscribe(topic, _pass_on)
        addresses = await self.host.addresses()
        # Half of the room for each, so that a second seed's addresses are never crowded out.
        named = (*addresses[: MAX_SEEDS // 2], *self._others)[:MAX_SEEDS]
        invite = Invite(run, self._signed.operator, named)
        log.info("bootstrap peer is up", peer=self.host.peer_id, addresses=addresses)
        return invite

    async def wait(self) -> None:
        """Until cancelled. Raises `SentinelError` if the network daemon ends."""
        await self.host.watch()

    async def stop(self) -> None:
        if hasattr(self, "_keeping"):
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            await self._ballots.stop()
        if hasattr(self, "_switchboard"):
            await self._switchboard.stop()
        if hasattr(self, "host"):
            await self.host.stop()


def _pass_on(author: PeerId, data: bytes) -> None:
    """p2pd has passed the message on already."""
