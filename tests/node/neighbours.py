"""A real pipeline of a tiny stage on a real p2pd, and neighbours that say to it what a test wants."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import torch

from node.compute import ComputeThread, Urgency
from node.passes import StagePasses
from node.pipeline import Pipeline
from node.progress import StageProgress
from node.trainer import StageTrainer
from protocol import messages, sockets, wire
from protocol.codec import Payload, TensorHeader, bytes_of, payload_digest, split_payload
from protocol.errors import Reason
from protocol.host import Host
from protocol.identity import Identity
from protocol.links import Link, Switchboard
from protocol.manifest import Manifest
from protocol.messages import PROTOCOL_VERSION, SESSION_SIZE, Activation, Credit, Gradient, Hello
from protocol.receipts import Direction, MicrobatchId, Receipt, SignedReceipt, check_hop

WITHIN = 20.0
CPU = torch.device("cpu")
M = TypeVar("M", bound=wire.Message)


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for what nobody announces; a `TimeoutError` if it does not come."""
    async with asyncio.timeout(WITHIN):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class Place:
    """A p2pd, its identity and its addresses."""

    host: Host
    identity: Identity
    addresses: list[str]


class Victim:
    """Stage 1 of 3. Owns what a volunteer owns, less the directory, gossip and rounds."""

    def __init__(self, place: Place, manifest: Manifest, *, capacity: int, hold_bytes: int) -> None:
        self.place, self.manifest, self.capacity = place, manifest, capacity
        self.run = secrets.token_bytes(32)
        self.compute = ComputeThread()
        self.passes = StagePasses(manifest, StageTrainer(manifest, 1, CPU), CPU)
        self.switchboard = Switchboard(
            place.host,
            self.run,
            stage=1,
            owner=self,
            max_tensor=self.passes.payload_size,
        )
        self.pipeline = Pipeline(
            manifest, 1, place.identity, self.switchboard, self.compute, self.passes, StageProgress(manifest),
            lambda: None, capacity=capacity, hold_bytes=hold_bytes,
        )  # fmt: skip

    @property
    def peer(self) -> Any:
        return self.place.identity.peer_id

    @property
    def refused(self) -> dict[Reason, int]:
        return dict(self.switchboard.refusals.counts)

    def on_link_up(self, link: Link) -> None:
        self.pipeline.on_link_up(link)

    def on_link_down(self, link: Link) -> None:
        self.pipeline.on_link_down(link)

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None:
        self.pipeline.on_announced(link, message, size)

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        self.pipeline.on_message(link, message, payload)

    async def until_refused(self, reason: Reason, count: int = 1) -> None:
        await until(lambda: self.refused.get(reason, 0) >= count)

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """The compute thread has something else to do meanwhile."""
        done = threading.Event()
        blocked = asyncio.create_task(self.compute.run(Urgency.ROUND, done.wait, 60.0))
        try:
            yield
        finally:
            done.set()
            await blocked

    async def stop(self) -> None:
        await self.pipeline.stop()
        await self.switchboard.stop()
        self.compute.stop()


@dataclass
class Neighbour:
    """Of any stage. What the victim says to it waits in `inbox`."""

    place: Place
    victim: Victim
    stage: int
    link: Any = None
    credit: int = 0
    inbox: asyncio.Queue[tuple[wire.Message, memoryview]] = field(default_factory=asyncio.Queue)
    down: asyncio.Event = field(default_factory=asyncio.Event)
    switchboard: Any = None

    @property
    def header(self) -> TensorHeader:
        return self.victim.passes.header

    async def meet(self) -> Neighbour:
        victim, place = self.victim, self.place
        self.switchboard = Switchboard(
            place.host, victim.run, stage=self.stage, owner=self, max_tensor=victim.passes.payload_size
        )
        await self.switchboard.start(accept=False)
        await self.again()
        return self

    async def again(self) -> None:
        self.down.clear()
        self.link = await self.switchboard.connect(self.victim.peer, self.victim.place.addresses)

    async def leave(self) -> None:
        theirs = self.victim.switchboard.links.get(self.place.identity.peer_id)
        self.link.close()
        await asyncio.wait_for(self.down.wait(), WITHIN)
        # Who comes back before the other side has noticed makes it give up the old link, and has to dial twice.
        await until(lambda: theirs is None or theirs.closed)

    def on_link_up(self, link: Link) -> None: ...

    def on_link_down(self, link: Link) -> None:
        self.down.set()

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None: ...

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        if isinstance(message, Credit):
            self.credit += message.amount
        self.inbox.put_nowait((message, payload.data))

    async def expect(self, kind: type[M]) -> tuple[M, memoryview]:
        """The next message of this kind; others before it are dropped."""
        async with asyncio.timeout(WITHIN):
            while True:
                message, payload = await self.inbox.get()
                if isinstance(message, kind):
                    return message, payload

    async def until_shut_out(self) -> None:
        await asyncio.wait_for(self.down.wait(), WITHIN)

    def digest(self, payload: bytes | memoryview) -> bytes:
        return payload_digest(self.header, *split_payload(self.header, memoryview(payload)))

    # --- what it says ---

    def payload(self, value: float = 0.5) -> bytes:
        """An activation and labels."""
        tensor = torch.full(self.header.shape, value)
        labels = torch.zeros(self.header.shape[:2], dtype=torch.int32)
        return bytes(bytes_of(tensor)) + bytes(bytes_of(labels))

    def sign(
        self,
        microbatch: MicrobatchId,
        direction: Direction,
        sent: bytes,
        *,
        signer: Identity | None = None,
        **changes: Any,
    ) -> SignedReceipt:
        content: dict[str, Any] = {
            "run": self.victim.run,
            "microbatch": microbatch,
            "direction": direction,
            "stage": self.stage,
            "version": 0,
            "input": b"i" * 32,
            "output": self.digest(sent),
            "sender": self.place.identity.peer_id,
            "recipient": self.victim.peer,
        }
        return SignedReceipt.sign(Receipt(**{**content, **changes}), signer or self.place.identity)

    def activate(self, slot: int, value: float = 0.5, attempt: int = 0) -> MicrobatchId:
        """Send an honest activation (unless `value` is not finite)."""
        microbatch = MicrobatchId(self.place.identity.peer_id, slot, attempt)
        payload = self.payload(value)
        receipt = self.sign(microbatch, Direction.ACTIVATION, payload)
        self.credit -= 1
        self.link.send(Activation(receipt, self.header), memoryview(payload))
        return microbatch

    def answer(self, microbatch: MicrobatchId, value: float = 1e-3, **changes: Any) -> None:
        payload = bytes(bytes_of(torch.full(self.header.shape, value)))
        receipt = self.sign(microbatch, Direction.GRADIENT, payload, **changes)
        self.link.send(Gradient(receipt, self.header), memoryview(payload))

    async def take(self) -> MicrobatchId:
        """As an honest tail: the next activation, checked as one would."""
        message, payload = await self.expect(Activation)
        check_hop(
            message.receipt, run=self.victim.run, sender=self.victim.peer,
            recipient=self.place.identity.peer_id, stage=1,
        )  # fmt: skip
        assert self.digest(payload) == message.receipt.receipt.output
        return message.receipt.receipt.microbatch

    async def stop(self) -> None:
        if self.switchboard is not None:
            await self.switchboard.stop()


async def round_trip(head: Neighbour, tail: Neighbour, slot: int, attempt: int = 0) -> None:
    """One microbatch all the way: the victim serves its honest neighbours."""
    microbatch = head.activate(slot, attempt=attempt)
    tail.link.send(Credit(1))
    assert await tail.take() == microbatch
    tail.answer(microbatch)
    message, payload = await head.expect(Gradient)
    assert message.receipt.receipt.microbatch == microbatch
    check_hop(
        message.receipt, run=head.victim.run, sender=head.victim.peer,
        recipient=head.place.identity.peer_id, stage=1,
    )  # fmt: skip
    assert head.digest(payload) == message.receipt.receipt.output


async def raw_stream(
    place: Place, victim: Victim, *, stage: int | None = None, session: bytes = bytes(SESSION_SIZE)
) -> socket.socket:
    """A stream of bytes to the victim; with `stage`, one that has said hello."""
    await place.host.connect(victim.peer, victim.place.addresses)
    stream = await sockets.dial(place.host.p2p, victim.peer, victim.switchboard._protocol, WITHIN)
    if stage is not None:
        await say(stream, messages.frame_of(Hello(PROTOCOL_VERSION, victim.run, stage, session)))
    return stream


async def say(stream: socket.socket, data: bytes) -> None:
    try:
        async with asyncio.timeout(WITHIN):
            await asyncio.get_running_loop().sock_sendall(stream, data)
    except OSError:
        return  # The victim hung up.


async def hung_up(stream: socket.socket) -> None:
    """Until the victim has closed the stream."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WITHIN):
        try:
            while await loop.sock_recv(stream, 65536):
                pass
        except OSError:
            pass
    stream.close()


@asynccontextmanager
async def responsive(limit: float = 1.0) -> AsyncIterator[None]:
    """Asserts that the event loop was never busy for as long as `limit` seconds at a stretch."""
    largest = 0.0

    async def tick() -> None:
        nonlocal largest
        last = monotonic()
        while True:
            await asyncio.sleep(0.005)
            now = monotonic()
            largest, last = max(largest, now - last), now

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
    assert largest < limit, f"the event loop was busy for {largest:.2f} s"
