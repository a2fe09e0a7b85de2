"""A tensor sent to a stage in another process, multiplied there by a vector, and back: three ways to do it.

Ours is the real data path: pipeline, links, p2pd, receipts signed and verified and bytes digested on both sides.
Theirs are hivemind's `RemoteExpert`, on which SWARM and its descendants stand, and p2pd's raw stream, which only
moves bytes: what it takes is what nobody that goes through p2pd can save.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace, TracebackType
from typing import Any, Literal, Self, cast

import torch
import uvloop
from hivemind.p2p import P2P, PeerID

from node.compute import ComputeThread
from node.passes import StagePasses
from node.pipeline import Pipeline
from node.presets import build_manifest
from node.progress import StageProgress
from node.trainer import Pass, StageTrainer
from protocol import wire
from protocol.codec import Payload, bytes_of
from protocol.host import LOOPBACK, Host
from protocol.identity import Identity, PeerId
from protocol.links import Link, Switchboard
from protocol.manifest import BatchSection, Manifest, SignedManifest, WireCodec
from protocol.messages import Activation, Gradient
from protocol.receipts import MicrobatchId

Trip = Literal["forward", "both"]
"""`forward`: there and back once. `both`: the output comes back, then its gradient goes and the input's comes back."""

SEQUENCES, CONTEXT, WIDTH = 8, 128, 512
TENSOR_BYTES = SEQUENCES * CONTEXT * WIDTH * 4
_CHUNK = 1 << 20
_READY_WITHIN = 120.0
_ANSWER_WITHIN = 300.0


# --- one way of doing it, in processes of its own ---


class Worker:
    """A process that says when it is ready, and answers each question put to it. Use as a context manager."""

    def __init__(self, main: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def wait_ready(self) -> Any:
        if not self._pipe.poll(_READY_WITHIN):
            raise TimeoutError("a benchmark process did not get ready")
        return self._pipe.recv()

    def ask(self, *question: object) -> Any:
        self._pipe.send(question)
        if not self._pipe.poll(_ANSWER_WITHIN):
            raise TimeoutError(f"a benchmark process did not answer {question}")
        return self._pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(20.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


async def _serve_questions(pipe: Connection, answer: Callable[..., Coroutine[Any, Any, object]]) -> None:
    """Until the other end closes the pipe."""
    with suppress(EOFError, OSError):
        while True:
            question = await asyncio.to_thread(pipe.recv)
            pipe.send(await answer(*question))


# --- ours ---


class _Scale:
    """Stands in for a stage's trainer: y = x * w. The last stage returns what the trip needs."""

    def __init__(self, *, is_first: bool, is_last: bool, device: torch.device) -> None:
        self.version = 0
        self.module = SimpleNamespace(is_first=is_first, is_last=is_last)
        self._weight = torch.ones(WIDTH, device=device, requires_grad=True)

    def forward(self, x: torch.Tensor) -> Pass:
        if self.module.is_first:
            return Pass(x, x, [], self.version)
        x = x.detach().requires_grad_()
        return Pass(x, x * self._weight, [self._weight], self.version)

    def backward(self, taken: Pass, gradient: torch.Tensor, *, accumulate: bool) -> torch.Tensor | None:
        assert taken._graph is not None and taken._x is not None
        if self.module.is_first:
            return None
        found, _ = torch.autograd.grad(taken._graph, [taken._x, self._weight], gradient)
        return found

    def loss_backward(
        self, x: torch.Tensor, labels: torch.Tensor, *, accumulate: bool, check: Callable[[float], None]
    ) -> tuple[float, torch.Tensor]:
        """Forward trip: the product goes back. Both: this is the caller, who sends a gradient as big as what came."""
        return 0.0, (x * self._weight).detach()


_TOKENS = torch.zeros(SEQUENCES, CONTEXT + 1, dtype=torch.int64)


class _HeadPasses(StagePasses):
    """Sends a given tensor instead of computing one from tokens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._x = torch.randn(SEQUENCES, CONTEXT, WIDTH)

    def inject(self, tokens: torch.Tensor, slot: int) -> Any:
        labels = torch.zeros(SEQUENCES, CONTEXT, dtype=torch.int32)
        return self._forward(self._x, bytes_of(labels), b"\0" * 32, 0)


class _Peer:
    """One stage's real pipeline over real links, with a vector instead of a model."""

    def __init__(self, manifest: Manifest, run: bytes, stage: int, folder: Path) -> None:
        self.manifest, self.run, self.stage = manifest, run, stage
        self._key = folder / f"{manifest.wire}-{manifest.stages.count}-{stage}.key"
        self.changed = asyncio.Event()
        self._slot = 0

    async def start(self) -> None:
        manifest, stage = self.manifest, self.stage
        identity = Identity.load_or_create(self._key)
        self.host = await Host.start(self._key, listen=LOOPBACK)
        self.compute = ComputeThread()
        is_first, is_last = stage == 0, stage == manifest.stages.count - 1
        device = torch.device("cpu")
        trainer = cast(StageTrainer, _Scale(is_first=is_first, is_last=is_last, device=device))
        kind = _HeadPasses if is_first else StagePasses
        passes = kind(manifest, trainer, device)
        self.switchboard = Switchboard(
            self.host,
            self.run,
            stage=stage,
            owner=self,
            max_tensor=passes.payload_size,
        )
        self.pipeline = Pipeline(
            manifest,
            stage,
            identity,
            self.switchboard,
            self.compute,
            passes,
            StageProgress(manifest),
            self.changed.set,
            capacity=16,
            hold_bytes=64 << 20,
        )
        await self.switchboard.start()

    async def place(self) -> tuple[PeerId, list[str]]:
        return self.host.peer_id, await self.host.addresses()

    def on_link_up(self, link: Link) -> None:
        self.pipeline.on_link_up(link)

    def on_link_down(self, link: Link) -> None:
        self.pipeline.on_link_down(link)

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None:
        self.pipeline.on_announced(link, message, size)

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        self.pipeline.on_message(link, message, payload)

    async def trips(self, count: int, window: int) -> float:
        """Seconds for `count` trips with at most `window` in flight."""
        pipeline, done = self.pipeline, self.pipeline.counts["microbatches"]
        began, sent = perf_counter(), 0
        while (back := pipeline.counts["microbatches"] - done) < count:
            while sent < count and sent - back < window:
                pipeline.inject(MicrobatchId(self.host.peer_id, self._slot), _TOKENS)
                self._slot += 1
                sent += 1
            self.changed.clear()
            async with asyncio.timeout(30.0):
                await self.changed.wait()
        return perf_counter() - began

    async def stop(self) -> None:
        await self.pipeline.stop()
        await self.switchboard.stop()
        self.compute.stop()
        await self.host.stop()


def _manifest(stages: int, codec: WireCodec) -> Manifest:
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": stages,
        "num_attention_heads": 8,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
    manifest = build_manifest(
        preset=None,
        config=config,
        stages=stages,
        data="builtin:pydoc",
        tokenizer="bytes",
        seed=0,
        testbed=False,
        schedule="overlapped",
        rounds=1,
        min_replicas=1,
        wire=codec,
        name="transport",
    )
    batch = BatchSection(context=CONTEXT, sequences=SEQUENCES, microbatches=4096)
    return manifest.model_copy(update={"batch": batch})


def own_worker(pipe: Connection, folder: Path) -> None:
    """The stage's process: the last stage of two, or the middle one of three where the trip is both ways."""
    torch.set_num_threads(1)
    peers: dict[bytes, _Peer] = {}

    async def answer(task: str, run: bytes, *arguments: Any) -> object:
        if task == "start":
            peer = peers[run] = _Peer(_manifest(*arguments), run, 1, folder)
            await peer.start()
            return await peer.place()
        await peers[run].switchboard.connect(*arguments)
        return None

    async def main() -> None:
        pipe.send(None)
        try:
            await _serve_questions(pipe, answer)
        finally:
            for peer in peers.values():
                await peer.stop()

    uvloop.run(main())


class OwnPath:
    """The callers' side for one kind of trip, connected to its stage at `worker`. Use as a context manager."""

    def __init__(self, worker: Worker, folder: Path, trip: Trip, codec: WireCodec) -> None:
        self._worker = worker
        self._stages, self._codec = 2 if trip == "forward" else 3, codec
        manifest = _manifest(self._stages, codec)
        self._run = SignedManifest.sign(manifest, Identity.generate()).run
        self._peers = [
            _Peer(manifest, self._run, stage, folder) for stage in range(self._stages) if stage != 1
        ]

    async def __aenter__(self) -> Self:
        peer, addresses = await self._ask("start", self._stages, self._codec)
        for one in self._peers:
            await one.start()
        head, *tails = self._peers
        await head.switchboard.connect(peer, addresses)
        for tail in tails:
            await self._ask("dial", *await tail.place())
        return self

    async def _ask(self, task: str, *arguments: object) -> Any:
        return await asyncio.to_thread(self._worker.ask, task, self._run, *arguments)

    async def trips(self, window: int, count: int) -> float:
        """Seconds a trip with at most `window` in flight."""
        return await self._peers[0].trips(count, window) / count

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._peers:
            await one.stop()


# --- p2pd's raw stream ---


def raw_worker(pipe: Connection, folder: Path) -> None:
    """Echoes what comes, payload by payload."""

    async def echo(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await P2P.send_raw_data(await P2P.receive_raw_data(reader), writer, chunk_size=_CHUNK)

    async def main() -> None:
        host = await _raw_host(folder / "raw-echo.key")
        try:
            await host.p2p.add_binary_stream_handler("raw", echo)
            pipe.send((host.peer_id, await host.addresses()))
            await _serve_questions(pipe, _nothing)
        finally:
            await host.stop()

    uvloop.run(main())


async def _raw_host(key: Path) -> Host:
    """The same daemon with the same encryption as ours, so that the difference is what we do around it."""
    Identity.load_or_create(key)
    return await Host.start(key, listen=LOOPBACK)


async def _nothing(*question: object) -> None: ...


class RawPath:
    """The caller's side of the raw stream. Use as a context manager."""

    def __init__(self, folder: Path, peer: PeerId, addresses: list[str]) -> None:
        self._key, self._peer, self._addresses = folder / "raw.key", peer, addresses
        self._payload = os.urandom(TENSOR_BYTES)

    async def __aenter__(self) -> Self:
        self._host = await _raw_host(self._key)
        await self._host.connect(self._peer, self._addresses)
        peer = PeerID.from_base58(self._peer)
        _, self._reader, self._writer = await self._host.p2p.call_binary_stream_handler(peer, "raw")
        return self

    async def trips(self, window: int, count: int) -> float:
        """Seconds a trip. With a window of 1 it is the ping-pong that everybody measures."""
        room = asyncio.Semaphore(window)

        async def send() -> None:
            for _ in range(count):
                await room.acquire()
                await P2P.send_raw_data(self._payload, self._writer, chunk_size=_CHUNK)

        began = perf_counter()
        sending = asyncio.create_task(send())
        for _ in range(count):
            await P2P.receive_raw_data(self._reader)
            room.release()
        await sending
        return (perf_counter() - began) / count

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        await self._host.stop()


# --- hivemind's RemoteExpert ---


class _ScaleExpert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def expert_worker(pipe: Connection) -> None:
    """Server and client. In a process of its own, since hivemind forks: DHT, connection handler and runtime."""
    import hivemind
    from hivemind.moe import get_experts
    from hivemind.moe.server import ModuleBackend, Server
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    torch.set_num_threads(1)
    module = _ScaleExpert()
    schema = BatchTensorDescriptor(CONTEXT, WIDTH)
    backend = ModuleBackend(
        name="stage.0",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), 1e-6),
        args_schema=(schema,),
        outputs_schema=schema,
        max_batch_size=64,
    )
    dht = hivemind.DHT(start=True)
    server = Server(dht, {"stage.0": backend}, num_connection_handlers=1, device="cpu", start=True)
    server.ready.wait()
    client = hivemind.DHT(initial_peers=[str(one) for one in dht.get_visible_maddrs()], start=True)
    expert = None
    while expert is None:
        (expert,) = get_experts(client, ["stage.0"])

    def call(trip: Trip) -> None:
        output = expert(torch.randn(SEQUENCES, CONTEXT, WIDTH, requires_grad=True))
        if trip == "both":
            output.sum().backward()

    call("both")
    pipe.send(None)
    with suppress(EOFError, OSError):
        while True:
            trip, window, count = pipe.recv()
            with ThreadPoolExecutor(window) as pool:
                list(pool.map(call, [trip] * window))
                began = perf_counter()
                list(pool.map(call, [trip] * count))
                pipe.send((perf_counter() - began) / count)
    server.shutdown()
    client.shutdown()
    dht.shutdown()
