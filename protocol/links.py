"""Links: everything that two peers say to each other directly, over one or more persistent streams.

A `Switchboard` keeps a peer's links: it dials, accepts, greets, watches heartbeats, answers requests, and shuts
out for a while who breaks the protocol. What tensors mean is its owner's business.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Protocol

import structlog

from protocol import sockets, streams, wire
from protocol.codec import Payload
from protocol.errors import ProtocolError, Reason
from protocol.host import Host
from protocol.identity import PeerId
from protocol.messages import (
    MAX_CHUNK,
    PROTOCOL_VERSION,
    SESSION_SIZE,
    Activation,
    Farewell,
    Gradient,
    Hello,
    Reply,
    Request,
    frame_of,
)
from protocol.refusals import Refusals
from protocol.streams import Stream
from protocol.tasks import Background
from protocol.vote_set import VoteSet
from protocol.votes import Verdict

log = structlog.get_logger("links")

HEARTBEAT = 1.0
_TIMES = 3
"""Heartbeats after which a stream's round trip is known."""
DEAD_AFTER = 6.0
"""Seconds without a byte after which a stream's other end counts as dead or hung."""
DIAL_TIMEOUT = 8.0
PENALTY = 30.0
_PARTING = 1.0
"""Seconds that a farewell has to reach who is banned, before the connection under it is closed."""
MAX_LINKS = 256
MAX_STREAMS = 8
MAX_REQUESTS = 16
"""Requests of one peer that are answered at the same time; more are refused as busy."""
MAX_ANSWERING = 512 * 1024 * 1024
"""Bytes of payload in requests being answered, of all peers together; more are refused as busy."""
LONG_ROUND_TRIP = 0.03
STREAMS_WHEN_LONG = 4

_EMPTY = memoryview(b"")

Answer = tuple[bytes, memoryview]
Method = Callable[["Link", bytes, memoryview], Awaitable[Answer]]


class Owner(Protocol):
    """What a switchboard tells its owner. Called on the event loop; must not block."""

    def on_link_up(self, link: Link) -> None: ...

    def on_link_down(self, link: Link) -> None: ...

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None:
        """A tensor is about to come, with `size` bytes of payload, for which memory is allocated next. May raise
        `ProtocolError`: it is refused before, and the sender shut out (REJECT)."""

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        """May raise `ProtocolError`: the message was such that the sender misbehaves, and is shut out (REJECT)."""


class Link:
    """The streams between us and one peer, and what is asked over them.

    They live and die together: what was under way on one that broke is lost, and only the end of the link tells both
    sides to send it again, or to hand it over to whom they choose instead.
    """

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.stage = -1
        self.session = secrets.token_bytes(SESSION_SIZE)
        self.their_session = b""
        self.streams: list[Stream] = []
        self.was_up = False
        self.settled = asyncio.Event()
        """Set when the link is up, or never will be."""
        self.farewell: Reason | None = None
        self.closed = False
        self.forgotten = False
        """Whether its owner has been told that it is down."""
        self.dialled = False
        self.answering = 0
        self._number = 0
        self._questions: dict[int, asyncio.Future[tuple[Reply, memoryview]]] = {}

    @property
    def is_up(self) -> bool:
        return self.was_up and not self.closed

    def greet(self, hello: Hello) -> None:
        self.stage, self.their_session, self.was_up = hello.stage, hello.session, True
        self.settled.set()

    @property
    def round_trip(self) -> float | None:
        """Seconds, the least of all streams' heartbeats; None until one of them is sure of it."""
        return min((stream.round_trip for stream in self.streams if stream.timed >= _TIMES), default=None)

    @property
    def backlog(self) -> int:
        """Bytes queued and not yet taken by p2pd, over all streams."""
        return sum(stream.backlog for stream in self.streams)

    def send(self, message: wire.Message, *payload: memoryview) -> None:
        """Queue a frame on the stream with the least queued. Raises `ProtocolError` (unreachable) without one."""
        stream = self._least_queued(one for one in self.streams if one.greeted)
        if self.closed or stream is None:
            raise ProtocolError(Reason.UNREACHABLE, self.peer)
        stream.send(message, *payload)

    def say_farewell(self, reason: Reason) -> None:
        """The peer reads it though it may not have greeted us yet. Without an open stream it is not told."""
        if stream := self._least_queued(self.streams):
            stream.send(Farewell(reason))

    def _least_queued(self, streams: Iterable[Stream]) -> Stream | None:
        return min((one for one in streams if one.is_open), key=lambda stream: stream.backlog, default=None)

    async def request(
        self, method: str, body: wire.Message, payload: memoryview = _EMPTY, *, timeout: float
    ) -> Answer:
        """Ask, and wait for the answer. Raises `ProtocolError` with the peer's refusal, timed_out or unreachable."""
        self._number += 1
        number = self._number
        question: asyncio.Future[tuple[Reply, memoryview]] = asyncio.get_running_loop().create_future()
        self._questions[number] = question
        try:
            self.send(Request(number, method, wire.encode(body)), payload)
            async with asyncio.timeout(timeout):
                reply, answer = await question
        except TimeoutError:
            raise ProtocolError(Reason.TIMED_OUT, f"{method} at {self.peer}") from None
        finally:
            del self._questions[number]
        if reply.refused is not None:
            raise ProtocolError(reply.refused, f"{method} at {self.peer}")
        return reply.body, answer

    def take_reply(self, reply: Reply, payload: memoryview) -> bool:
        """False if nobody waits for it: it came too late, or was never asked for."""
        question = self._questions.get(reply.number)
        if question is None or question.done():
            return False
        question.set_result((reply, payload))
        return True

    def close(self, *, abort: bool = False) -> None:
        self.retire()
        for stream in tuple(self.streams):
            (stream.abort if abort else stream.close)()

    def retire(self) -> None:
        """From now on nothing is sent, and what still comes is not read."""
        self.closed = True
        self.settled.set()
        for question in self._questions.values():
            if not question.done():
                question.set_exception(ProtocolError(Reason.UNREACHABLE, self.peer))


class Switchboard:
    """All links of one peer in one run. `max_tensor` bounds a tensor's payload in bytes (0: takes none)."""

    def __init__(
        self,
        host: Host,
        run: bytes,
        *,
        stage: int,
        owner: Owner,
        max_tensor: int = 0,
        delay: float = 0.0,
    ) -> None:
        self.host, self.run, self.stage = host, run, stage
        self.refusals = Refusals()
        self.links: dict[PeerId, Link] = {}
        self.methods: dict[str, Method] = {}
        self._max_tensor, self._owner, self._delay = max_tensor, owner, delay
        self._protocol = f"/sentinel/{run.hex()[:16]}/{PROTOCOL_VERSION}"
        self._acceptor = sockets.Acceptor(self._accept)
        self._penalties: OrderedDict[PeerId, float] = OrderedDict()
        self._dialling: dict[PeerId, asyncio.Lock] = {}
        self._votes: VoteSet | None = None
        self._parting: set[PeerId] = set()
        self._tasks = Background()
        self._answering = 0

    def obey(self, votes: VoteSet) -> None:
        """From now on have nothing to do with whom `votes` bans: no links to or from them, and those there are end."""
        self._votes = votes
        votes.subscribe(self._on_verdict)
        for peer in tuple(self.links):
            if votes.is_banned(peer):
                self._expel(peer)

    async def start(self, *, accept: bool = True) -> None:
        """`accept=False`: only dial, as one does who has nothing to serve yet."""
        if accept:
            await self._acceptor.start(self.host.p2p, self._protocol)
        self._tasks.spawn(self._watch())

    async def stop(self) -> None:
        """Close every link, letting queued frames leave."""
        await self._acceptor.stop()
        for link in tuple(self.links.values()):
            self._close(link)
        await self._tasks.stop()

    # --- opening ---

    async def connect(
        self, peer: PeerId, addresses: Iterable[str] = (), *, timeout: float = DIAL_TIMEOUT
    ) -> Link:
        """The link to `peer`, dialled if there is none.

        Raises `ProtocolError`: unreachable, timed_out, what `_check_admitted` says, or what its farewell says.
        """
        lock = self._dialling.setdefault(peer, asyncio.Lock())
        try:
            async with asyncio.timeout(timeout), lock:
                link = self.links.get(peer)
                if link is None or not link.is_up:
                    self._check_admitted(peer)
                    await self.host.connect(peer, addresses)
                    link = await self._open_stream(peer)
                    link.dialled = True
                    await link.settled.wait()
                    if not link.is_up:
                        raise ProtocolError(link.farewell or Reason.UNREACHABLE, peer)
                return link
        except TimeoutError:
            raise ProtocolError(Reason.TIMED_OUT, f"dialling {peer}") from None
        finally:
            if not lock.locked():
                self._dialling.pop(peer, None)

    def keep(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Dial `peer` in the background if there is no link to it; to be called now and then.

        One attempt at a time: who hangs takes as long as it may.
        """
        link = self.links.get(peer)
        if (link is None or not link.is_up) and peer not in self._dialling:
            self._tasks.spawn(self._attempt(peer, addresses))

    async def _attempt(self, peer: PeerId, addresses: Iterable[str]) -> None:
        with suppress(ProtocolError):
            await self.connect(peer, addresses)

    def _check_admitted(self, peer: PeerId) -> None:
        """Raises `ProtocolError`: banned, shut_out, or busy where there is no room for another link."""
        self._check_not_banned(peer)
        if self._penalties.get(peer, 0.0) > monotonic():
            raise ProtocolError(Reason.SHUT_OUT, f"{peer} broke the protocol")
        if peer not in self.links and len(self.links) >= MAX_LINKS:
            raise ProtocolError(Reason.BUSY, "too many links")

    def _check_not_banned(self, peer: PeerId) -> None:
        if self._votes is not None and self._votes.is_banned(peer):
            raise ProtocolError(Reason.BANNED, peer)

    async def _open_stream(self, peer: PeerId) -> Link:
        endpoint = await sockets.dial(self.host.p2p, peer, self._protocol, DIAL_TIMEOUT)
        try:
            self._check_not_banned(peer)  # It may have become so while we dialled.
        except ProtocolError:
            endpoint.close()
            raise
        return await self._adopt(peer, endpoint)

    async def _accept(self, peer: PeerId, endpoint: socket.socket) -> None:
        try:
            self._check_admitted(peer)
            await self._adopt(peer, endpoint)
        except ProtocolError as error:
            self.refusals.count(peer, error)
            if error.reason is Reason.BANNED and peer not in self._parting:
                await self._say_farewell(peer, endpoint)
            raise

    async def _say_farewell(self, peer: PeerId, endpoint: socket.socket) -> None:
        """On a stream that is not taken: the volunteer at its other end should know why, to tell its owner."""
        self._parting.add(peer)
        try:
            await asyncio.get_running_loop().sock_sendall(endpoint, frame_of(Farewell(Reason.BANNED)))
            # Closed with unread bytes in it, the stream would be reset before the farewell is read.
            endpoint.shutdown(socket.SHUT_WR)
            await asyncio.sleep(self._delay + _PARTING)
            await self._disconnect(peer)
        finally:
            self._parting.discard(peer)

    async def _adopt(self, peer: PeerId, endpoint: socket.socket) -> Link:
        link = self.links.get(peer)
        if link is None or link.closed:
            link = self.links[peer] = Link(peer)
        if len(link.streams) >= MAX_STREAMS:
            raise ProtocolError(Reason.BUSY, "too many streams")
        stream = Stream(
            Hello(PROTOCOL_VERSION, self.run, self.stage, link.session),
            self._max_tensor,
            lambda tensor, size: self._on_tensor(link, tensor, size),
            lambda stream, message, payload: self._on_frame(link, stream, message, payload),
            lambda stream: self._on_stream_closed(link, stream),
            lambda stream, error: self._on_violation(link, error),
            self._delay,
        )
        link.streams.append(stream)
        try:
            await streams.attach(stream, endpoint)
        except ProtocolError:
            self._on_stream_closed(link, stream)
            raise
        if link.closed:
            # While the stream was on its way. Nobody listens on it, so that its hello would be missed.
            stream.abort()
            raise ProtocolError(Reason.UNREACHABLE, f"the link to {peer} was closed")
        return link

    # --- reading ---

    def _on_violation(self, link: Link, error: ProtocolError) -> None:
        """What comes after we have closed the link was not heard in full, and says nothing about the peer."""
        if not link.closed:
            self.reject(link.peer, error)

    def _on_tensor(self, link: Link, tensor: Activation | Gradient, size: int) -> bool:
        """False on a link that is closed: what still comes is not used, and a farewell may be on its way out."""
        if link.closed:
            return False
        self._owner.on_announced(link, tensor, size)
        return True

    def _on_frame(self, link: Link, stream: Stream, message: wire.Message, payload: Payload) -> None:
        if link.closed:
            # Whose hello comes only now may go on until it reads our farewell: a refusal would reset the stream first.
            stream.greeted = stream.greeted or isinstance(message, Hello)
            return
        if isinstance(message, Hello):
            self._greet(link, stream, message)
        elif isinstance(message, Farewell):
            link.farewell = message.reason
            self.refusals.count(link.peer, ProtocolError(message.reason, "farewell"))
            link.close()
        elif isinstance(message, Request):
            self._tasks.spawn(self._answer(link, message, payload.data))
        elif isinstance(message, Reply):
            if not link.take_reply(message, payload.data):
                self.refusals.count(link.peer, ProtocolError(Reason.UNSOLICITED, f"reply {message.number}"))
        else:
            self._owner.on_message(link, message, payload)

    def _greet(self, link: Link, stream: Stream, hello: Hello) -> None:
        if stream.greeted:
            raise ProtocolError(Reason.MALFORMED, "second hello")
        if hello.version != PROTOCOL_VERSION:
            raise ProtocolError(Reason.WRONG_VERSION, str(hello.version))
        if hello.run != self.run:
            raise ProtocolError(Reason.FOREIGN_RUN)
        if link.was_up and hello.session != link.their_session:
            # It gave up the link that we still believe in, with all that was under way on it. So do we; it dials again.
            log.info("link begun anew by the other side", peer=link.peer)
            self._close(link, abort=True)
            return
        if link.was_up and hello.stage != link.stage:
            raise ProtocolError(Reason.WRONG_STAGE, f"{hello.stage} and {link.stage} on one link")
        stream.greeted = True
        stream.ping()
        if not link.was_up:
            link.greet(hello)
            self._owner.on_link_up(link)

    async def _answer(self, link: Link, request: Request, payload: memoryview) -> None:
        refused, body, answer = None, b"", _EMPTY
        link.answering += 1
        self._answering += len(payload)
        try:
            if link.answering > MAX_REQUESTS or self._answering > MAX_ANSWERING:
                raise ProtocolError(Reason.BUSY, request.method)
            method = self.methods.get(request.method)
            if method is None:
                raise ProtocolError(Reason.UNKNOWN_METHOD, request.method)
            body, answer = await method(link, request.body, payload)
            if len(answer) > MAX_CHUNK:
                raise ProtocolError(Reason.OVERSIZED, f"answer to {request.method}")
        except ProtocolError as error:
            self.refusals.count(link.peer, error)
            refused, body, answer = error.reason, b"", _EMPTY
        except Exception:
            log.exception("request failed", method=request.method, peer=link.peer)
            self.refusals.counts[Reason.INTERNAL] += 1
            refused, body, answer = Reason.INTERNAL, b"", _EMPTY
        finally:
            link.answering -= 1
            self._answering -= len(payload)
        try:
            link.send(Reply(request.number, refused, body), answer)
        except ProtocolError:
            return  # The one who asked is gone.

    # --- ending ---

    def _on_stream_closed(self, link: Link, stream: Stream) -> None:
        if stream in link.streams:
            link.streams.remove(stream)
        if link.streams and not link.closed and not stream.greeted:
            return  # One more stream that did not come to be.
        self._close(link, abort=True)

    def _close(self, link: Link, *, abort: bool = False) -> None:
        """Once. The owner hears of it when whoever calls is done, and before the peer's next link can come up."""
        if not link.closed:
            link.close(abort=abort)
        asyncio.get_running_loop().call_soon(self._forget, link)

    def _forget(self, link: Link) -> None:
        if link.forgotten:
            return
        link.forgotten = True
        if self.links.get(link.peer) is link:
            del self.links[link.peer]
        if link.was_up:
            self._owner.on_link_down(link)

    def _on_verdict(self, peer: PeerId, before: Verdict, after: Verdict) -> None:
        if after is Verdict.BANNED:
            self._expel(peer)

    def _expel(self, peer: PeerId) -> None:
        """The peer is banned: its link is down at once; it is told why, and then its connection is closed."""
        link = self.links.get(peer)
        if link is not None:
            link.say_farewell(Reason.BANNED)
            link.retire()
            self._forget(link)
        self._tasks.spawn(self._part(peer, link))

    async def _part(self, peer: PeerId, link: Link | None) -> None:
        try:
            if link is not None:
                await asyncio.sleep(self._delay + _PARTING)
            await self._disconnect(peer)
        finally:
            if link is not None:
                link.close(abort=True)

    async def _disconnect(self, peer: PeerId) -> None:
        """Unless it has been voted down meanwhile: the connection may be in use again."""
        if self._votes is not None and self._votes.is_banned(peer):
            await self.host.disconnect(peer)

    def reject(self, peer: PeerId, error: ProtocolError) -> None:
        """The peer misbehaved: count it, close the link and shut it out for a while."""
        self.refusals.count(peer, error, rejected=True)
        self._penalties.pop(peer, None)
        self._penalties[peer] = monotonic() + PENALTY
        if len(self._penalties) > 4 * MAX_LINKS:
            self._penalties.popitem(last=False)
        if link := self.links.get(peer):
            self._close(link, abort=True)

    async def _watch(self) -> None:
        """Heartbeats: ping quiet streams, abort the silent ones, and open more where the round trip is long.

        Who dialled pings, and both hear each other by it; the other side does so only where it hears nothing. A busy
        stream needs pings only at first, to tell its round trip.
        """
        last = monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT)
            now = monotonic()
            # Where we ourselves were stopped, silence says nothing about the others.
            stopped, last = now - last > DEAD_AFTER / 2, now
            for link in tuple(self.links.values()):
                for stream in tuple(link.streams):
                    if stopped:
                        stream.last_heard = now
                    elif now - stream.last_heard > DEAD_AFTER:
                        self.refusals.count(link.peer, ProtocolError(Reason.TIMED_OUT, "no heartbeat"))
                        stream.abort()
                    elif stream.greeted and _is_ping_due(link, stream, now):
                        stream.ping()
                if link.dialled and (link.round_trip or 0.0) > LONG_ROUND_TRIP:
                    self._tasks.spawn(self._widen(link))

    async def _widen(self, link: Link) -> None:
        """A single stream's window does not fill a long pipe: open a few, up to `STREAMS_WHEN_LONG`."""
        while link.is_up and len(link.streams) < STREAMS_WHEN_LONG:
            try:
                await self._open_stream(link.peer)
            except ProtocolError:
                return


def _is_ping_due(link: Link, stream: Stream, now: float) -> bool:
    silent = now - stream.last_heard
    if link.dialled:
        return stream.timed < _TIMES or silent > 3 * HEARTBEAT
    return silent > 4 * HEARTBEAT
