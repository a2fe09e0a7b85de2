"""The command line as a person meets it: exit code, stdout and stderr, and what it leaves running."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import structlog

from bootstrap.seed import Seed
from cli.main import main
from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.manifest import Manifest, SignedManifest
from tests.swarms import small_manifest

LISTEN = ("--listen", LOOPBACK[0])


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def says(self, *parts: str, code: int = 2) -> None:
        """One line on stderr with all of `parts` in it, no traceback, and this exit code."""
        lines = self.err.splitlines()
        assert self.code == code, self.err
        assert len(lines) == 1, self.err
        assert lines[0].startswith("sentinel-node: ")
        for part in parts:
            assert part in lines[0], self.err


Invoke = Callable[..., Outcome]


def daemons_of_this_process() -> list[psutil.Process]:
    """p2pd children that commands run in this process have left; those of seeds on other threads are not theirs."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "p2pd" in child.name()]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """`invoke("join", ...)` runs the command in this process. It must leave no p2pd behind."""

    def run(*words: str | Path) -> Outcome:
        before = set(daemons_of_this_process())
        monkeypatch.setattr(sys, "argv", ["sentinel-node", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        left = [one for one in daemons_of_this_process() if one not in before]
        assert not left, "the command left p2pd running"
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    handlers = logging.getLogger().handlers[:]
    yield run
    # The commands log to what was stderr at the time.
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


@contextmanager
def serving(seed: Seed) -> Iterator[str]:
    """The seed on a thread of its own; gives its invite."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield str(asyncio.run_coroutine_threadsafe(seed.start(), loop).result(60))
    finally:
        asyncio.run_coroutine_threadsafe(seed.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def hosted(manifest: Manifest, folder: Path) -> Iterator[str]:
    """A seed of this manifest; gives its invite."""
    signed = SignedManifest.sign(manifest, Identity.generate())
    with serving(Seed(signed, folder / "seed.key", LOOPBACK)) as invite:
        yield invite


@pytest.fixture(scope="module")
def run_invite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The invite of a run of three small stages whose seed is up."""
    with hosted(small_manifest(), tmp_path_factory.mktemp("seed")) as invite:
        yield invite


@contextmanager
def no_room_for_files_over(size: int) -> Iterator[None]:
    """As on a full disk: this process can write no file longer than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
