"""A swarm on this machine: a seed and volunteers as processes of their own, and an observer that watches them.

The processes run the very commands that a person would type. They are forked from a server that has imported
everything once, since on a small machine a dozen imports of torch take longer than the run.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import uvloop

from node.heap import keep_freed
from node.observer import Observer
from protocol.errors import BannedError, SentinelError
from protocol.host import LOOPBACK
from protocol.identity import Identity, PeerId
from protocol.invite import Invite
from protocol.manifest import Manifest, SignedManifest, VerificationSection

T = TypeVar("T")

_INVITE_WITHIN = 60.0
_STOP_WITHIN = 25.0
_POLL = 0.1


class SwarmError(SentinelError):
    """A process of the swarm did not do what it should; says where its log is."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run what starts swarms, on uvloop. SIGTERM cancels it, as Ctrl-C does, so that they are stopped in order.
    Raises `CancelledError` then."""

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(cancellable())


def _entry_point() -> EntryPoint:
    """The installed `sentinel-node` command."""
    (found,) = entry_points(group="console_scripts", name="sentinel-node")
    return found


def become(arguments: Sequence[str], stdout: Path, stderr: Path) -> None:
    """In a child forked for it: be `sentinel-node ARGUMENTS`, with its output in these files."""
    for path, number in ((stdout, 1), (stderr, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # While it has one thread: the heap that another one makes for itself would be used by later ones, too.
    keep_freed()
    os.setpgrp()  # Ctrl-C at the terminal is for the parent, which stops its children in order.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["sentinel-node", *arguments]
    _entry_point().load()()


def _end_with_parent() -> None:
    """Who is killed cannot stop its children: they would go on without it, and nobody would know of them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Process:
    """One command of the swarm."""

    name: str
    process: ForkServerProcess
    stdout: Path
    stderr: Path
    peer: PeerId
    stage: int = -1
    is_attacker: bool = False

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    @property
    def was_banned(self) -> bool:
        """Whether it ended because it was told that it is banned."""
        return bool(self.process.exitcode == BannedError.exit_code)

    def signal(self, number: int) -> None:
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As a crash would: no time for anything."""
        self.signal(signal.SIGKILL)

    def tail(self, lines: int = 15) -> str:
        text = self.stderr.read_text(errors="replace") if self.stderr.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


@dataclass
class LocalSwarm:
    """The processes of one run on loopback, with their files in `folder`. Made by `local_swarm`."""

    folder: Path
    signed: SignedManifest
    invite: str = ""
    seed: Process | None = None
    nodes: list[Process] = field(default_factory=list)
    verifiers: list[Process] = field(default_factory=list)
    threads: int = 1
    link_delay: float = 0.0
    _context: Any = None
    _count: int = 0

    @property
    def processes(self) -> list[Process]:
        return [*self.verifiers, *self.nodes, *([self.seed] if self.seed else [])]

    def _launch(self, name: str, *arguments: str, stage: int = -1) -> Process:
        key = self.folder / f"{name}.key"
        peer = Identity.load_or_create(key).peer_id
        stdout, stderr = self.folder / f"{name}.out", self.folder / f"{name}.log"
        listen = [word for address in LOOPBACK for word in ("--listen", address)]
        words = [*arguments, *listen, "--identity", str(key)]
        process = self._context.Process(target=become, args=(words, stdout, stderr), name=name)
        process.start()
        return Process(name, process, stdout, stderr, peer, stage)

    async def start_seed(self) -> None:
        """Start the bootstrap peer and wait for its invite."""
        manifest = self.folder / "run.toml"
        self.signed.write(manifest)
        self.seed = self._launch("bootstrap", "bootstrap", "--manifest", str(manifest))
        deadline = monotonic() + _INVITE_WITHIN
        while not self.invite:
            if not self.seed.is_alive or monotonic() > deadline:
                raise SwarmError(f"the bootstrap peer gave no invite: {self.seed.tail()}")
            await asyncio.sleep(_POLL)
            if self.seed.stdout.exists():
                self.invite = self.seed.stdout.read_text().strip()

    def join(self, stage: int, *more: str, name: str = "") -> Process:
        """Start a volunteer on `stage`."""
        self._count += 1
        name = name or f"node{self._count}-stage{stage}"
        options = [
            "--stage",
            str(stage),
            "--threads",
            str(self.threads),
            "--cache-dir",
            str(self.folder / name),
        ]
        options += ["--device", "cpu", "--link-delay", str(self.link_delay * 1e3), *more]
        process = self._launch(name, "join", self.invite, *options, stage=stage)
        process.is_attacker = "--attack" in more
        self.nodes.append(process)
        return process

    def verify(self) -> Process:
        """Start the next of the verifiers that `with_verifiers` has made."""
        name = verifier_name(len(self.verifiers))
        process = self._launch(name, "verify", self.invite)
        self.verifiers.append(process)
        return process

    def check_alive(self, *, but: Sequence[Process] = ()) -> None:
        """Raises `SwarmError` with the end of its log if a process is gone that should not be."""
        for process in self.processes:
            if process not in but and not process.is_alive:
                raise SwarmError(f"{process.name} ended (code {process.process.exitcode}):\n{process.tail()}")

    async def stop(self) -> None:
        """SIGTERM to all, then SIGKILL to who is still there."""
        for process in self.processes:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGTERM)
        deadline = monotonic() + _STOP_WITHIN
        for process in self.processes:
            await asyncio.to_thread(process.process.join, max(0.0, deadline - monotonic()))
        for process in self.processes:
            process.kill()
            await asyncio.to_thread(process.process.join)


def verifier_name(number: int) -> str:
    return f"verifier{number + 1}"


def with_verifiers(manifest: Manifest, folder: Path, count: int, quorum: int, **policy: Any) -> Manifest:
    """The manifest with `count` verifiers, whose keys are made in `folder`; `policy`: of `VerificationSection`."""
    keys = [folder / f"{verifier_name(number)}.key" for number in range(count)]
    verifiers = tuple(Identity.load_or_create(key).peer_id for key in keys)
    section = VerificationSection(verifiers=verifiers, quorum=quorum if count else 1, **policy)
    return manifest.model_copy(update={"verification": section})


def _clear(folder: Path) -> None:
    """An earlier swarm in the same folder has left its invite, its states and its votes. Keys may stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.out", "*.log", "*.votes"):
        for path in folder.glob(pattern):
            path.unlink()
    for path in folder.glob("node*-stage*"):
        if path.is_dir():
            shutil.rmtree(path)


@asynccontextmanager
async def local_swarm(
    manifest: Manifest, folder: Path, *, threads: int = 1, link_delay: float = 0.0
) -> AsyncIterator[LocalSwarm]:
    """A seed for `manifest`, to which volunteers can be added; everything is stopped at the end."""
    context = multiprocessing.get_context("forkserver")
    # The command, and what it would import late: the model's architecture.
    architecture = str(manifest.model.config["model_type"])
    modelling = f"transformers.models.{architecture}.modeling_{architecture}"
    context.set_forkserver_preload(
        [_entry_point().module, "node.volunteer", "bootstrap.seed", "verifier.service", modelling]
    )
    await asyncio.to_thread(_clear, folder)
    signed = SignedManifest.sign(manifest, Identity.load_or_create(folder / "operator.key"))
    swarm = LocalSwarm(folder, signed, threads=threads, link_delay=link_delay, _context=context)
    try:
        await swarm.start_seed()
        yield swarm
    finally:
        await swarm.stop()


@asynccontextmanager
async def watching(swarm: LocalSwarm) -> AsyncIterator[Observer]:
    """An observer of the swarm, in this process."""
    observer = Observer(Invite.parse(swarm.invite), swarm.folder / "observer.key", LOOPBACK)
    try:
        await observer.start()
        yield observer
    finally:
        await observer.stop()


async def until(observer: Observer, is_done: Callable[[], bool], *, timeout: float, what: str) -> None:
    """Wait for a report that makes `is_done` true. Raises `SwarmError` naming `what` was waited for."""
    deadline = monotonic() + timeout
    while not is_done():
        await observer.wait_for_news(timeout=1.0)
        if monotonic() > deadline:
            seen = {peer[-6:]: sighting.metrics for peer, sighting in observer.sightings.items()}
            raise SwarmError(f"waited {timeout:.0f} s for {what}; last seen: {seen}")
