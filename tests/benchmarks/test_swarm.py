"""What starts swarms stops them, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

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


def test_its_processes_end_with_it_even_if_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SWARM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seed = psutil.Process(int(process.stdout.readline()))
        family = [seed, *seed.children(recursive=True)]
        assert len(family) > 1, "a bootstrap peer has its p2pd"
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    for one in alive:
        one.kill()
    assert not alive, (tmp_path / "bootstrap.log").read_text()
