"""What a process that computes for hours asks of the system, it and those that it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, os, sys
from cli import running

async def main():
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "import os; print(os.sched_getscheduler(0))")
    assert await child.wait() == 0
    print(os.sched_getscheduler(0))

# Whoever runs this may have been told so before.
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
getattr(running, sys.argv[1])(main())
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone")
@pytest.mark.parametrize(("how", "policy"), [("run", "SCHED_OTHER"), ("run_long", "SCHED_BATCH")])
def test_who_computes_for_hours_does_so_in_batches(how: str, policy: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(getattr(os, policy))] * 2


THREADS = """
import os, sys
import torch
from cli import running

running.use_threads(int(sys.argv[1]))
print(torch.get_num_threads(), os.environ.get("GOMAXPROCS"))
"""


@pytest.mark.parametrize(
    ("count", "already", "expected"), [(1, None, "1"), (3, None, "3"), (1, "4", "4"), (0, None, "None")]
)
def test_p2pd_gets_as_many_threads_as_torch(count: int, already: str | None, expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "GOMAXPROCS"}
    if already:
        environment["GOMAXPROCS"] = already
    command = [sys.executable, "-c", THREADS, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    threads, p2pd = done.stdout.split()
    assert p2pd == expected
    assert not count or threads == str(count)
