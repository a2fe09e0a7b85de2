"""What starts swarms stops them, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys

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
