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
