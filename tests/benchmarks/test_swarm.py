"""What starts swarms stops them, whatever ends it."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import asyncio
from benchmarks import swarm

async def main():
    print("started", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0)
        print("stopped", flush=True)

try:
    swarm.run(main())
except asyncio.CancelledError:
    print("cancelled", flush=True)
"""


def test_sigterm_lets_it_clean_up() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert output.split() == ["stopped", "cancelled"]
    assert process.returncode == 0


SWARM = """
import asyncio, sys
from pathlib import Path
from benchmarks import swarm
from tests.swarms import small_manifest

async def main():
    async with swarm.local_swarm(small_manifest(), Path(sys.argv[1])) as running:
        print(running.seed.process.pid, flush=True)
        await asyncio.sleep(60)

swarm.run(main())
"""


@contextmanager
def swarm_of_one(folder: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """What runs a swarm, and the swarm's bootstrap peer."""
    command = [sys.executable, "-c", SWARM, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, psutil.Process(int(process.stdout.readline()))
        finally:
            process.terminate()


def test_its_processes_end_with_it_even_if_it_is_killed(tmp_path: Path) -> None:
    with swarm_of_one(tmp_path) as (process, seed):
        family = [seed, *seed.children(recursive=True)]
        assert len(family) > 1, "a bootstrap peer has its p2pd"
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    for one in alive:
        one.kill()
    assert not alive, (tmp_path / "bootstrap.log").read_text()


HEAP_SIZE = 64 << 20
"""Of glibc's heaps beside the main one (arena.c, HEAP_MAX_SIZE): they begin at a multiple of it, and what is not in use
of them yet is not to be read."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_each_of_its_processes_has_one_heap(tmp_path: Path) -> None:
    with swarm_of_one(tmp_path) as (_, seed):
        lines = Path(f"/proc/{seed.pid}/maps").read_text().splitlines()
    maps = [([int(end, 16) for end in line.split()[0].split("-")], line.split()[1]) for line in lines]
    others = [
        start
        for ((start, end), rights), ((rest, last), more) in pairwise(maps)
        if (rights, more) == ("rw-p", "---p")
        and (start % HEAP_SIZE, rest, last) == (0, end, start + HEAP_SIZE)
    ]
    assert any(line.endswith("[heap]") for line in lines)
    assert not others, (
        "a thread was started before `keep_freed`: what `touch` makes ready may be another's heap"
    )
