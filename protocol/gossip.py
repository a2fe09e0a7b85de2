"""libp2p's gossipsub inside p2pd, over the daemon's control socket; hivemind has no binding for it.

Messages are signed by their author's p2pd and checked by every p2pd on the way (pubsubSignStrict),
so `author` can be believed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import structlog
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    ControlFailure,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2

from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId

log = structlog.get_logger("gossip")

MAX_GOSSIP = 256 * 1024
"""Bytes of one gossip message; a larger one is dropped unread. The longest report has three lists of 8,192 slots."""

_PUBLISH_WITHIN = 5.0
_REUSED = 64 * 1024
"""Bytes of gossip that are read into the same message. After every 10,000 pieces of memory that protobuf has freed it
has the C library give all that is free back to the system, and what computes must get it anew, page by page."""

OnGossip = Callable[[PeerId, bytes], None]


async def _open(p2p: P2P) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    return reader, writer


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, **asked: object) -> None:
    """`asked`: the fields of a `PSRequest`."""
    await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.PUBSUB, pubsub=asked))
    response = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, response)
    raise_if_failed(response)


class Publisher:
    """Publishes over one connection to p2pd, which takes requests on it one after another.

    A connection for each message would be half of what a message costs here. `close` it in the end.
    """

    def __init__(self, p2p: P2P) -> None:
        self._p2p = p2p
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to every subscriber of `topic`, ourselves included if we subscribe.

        Raises `ProtocolError` (unreachable or timed_out) if p2pd does not take it.
        """
        try:
            async with asyncio.timeout(_PUBLISH_WITHIN), self._turn:
                await self._publish(topic, data)
        except TimeoutError:
            raise ProtocolError(Reason.TIMED_OUT, f"gossip on {topic}") from None
        except (ControlFailure, OSError, asyncio.IncompleteReadError) as error:
            raise ProtocolError(Reason.UNREACHABLE, f"gossip on {topic}: {error}") from None

    async def _publish(self, topic: str, data: bytes) -> None:
        try:
            self._streams = self._streams or await _open(self._p2p)
            await _ask(*self._streams, type=p2pd_pb2.PSRequest.PUBLISH, topic=topic, data=data)
        except BaseException:
            # Its answer, if it still comes, would be taken for that to the next request.
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            with suppress(OSError, RuntimeError):
                self._streams[1].close()
            self._streams = None


@lru_cache(maxsize=1024)
def _author(raw: bytes) -> PeerId:
    return PeerId(PeerID(raw).to_base58())


def _tell(on_gossip: OnGossip, author: PeerId, data: bytes) -> None:
    try:
        on_gossip(author, data)
    except Exception:
        # One message must not end the subscription.
        log.exception("a gossip message could not be taken", author=author)


async def subscribe(p2p: P2P, topic: str, on_gossip: OnGossip) -> asyncio.Task[None]:
    """Call `on_gossip(author, data)` for each message until the returned task is cancelled.

    Of messages that come faster than they are read p2pd keeps 32 for us, and drops the others (go-libp2p-pubsub,
    `WithBufferSize`): what nobody may miss has to be asked for as well.
    """
    reader, writer = await _open(p2p)
    await _ask(reader, writer, type=p2pd_pb2.PSRequest.SUBSCRIBE, topic=topic)

    async def read() -> None:
        # The writer is named here to keep it alive: p2pd ends a subscription whose connection closes.
        message, size = p2pd_pb2.PSMessage(), 0
        try:
            while True:
                if size > _REUSED:
                    message, size = p2pd_pb2.PSMessage(), 0
                await read_pbmsg_safe(reader, message)
                size += message.ByteSize()
                if len(message.data) <= MAX_GOSSIP:
                    _tell(on_gossip, _author(getattr(message, "from")), bytes(message.data))
        except asyncio.IncompleteReadError:
            return
        finally:
            with suppress(OSError, RuntimeError):
                writer.close()

    return asyncio.create_task(read(), name=f"gossip {topic}")
