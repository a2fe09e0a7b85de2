"""A process that keeps its heap meets no page for the first time where it is in a hurry."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from node.heap import keep_freed, touch

def use():
    return [np.full(size, 7, dtype=np.uint8) for size in (100_000, 400_000, 1_300_000) * 8]

if sys.argv[1] == "kept":
    keep_freed()
    worker = threading.Thread(target=touch, args=(32 << 20,))
    worker.start()
    worker.join()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages met for the first time in twenty passes over 14 MB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_what_is_freed_is_used_again() -> None:
    kept = faults("kept")
    assert kept < 100, "the heap was given back to the system, or what was touched was another thread's"
    assert faults("given back") > 10 * max(kept, 10), "this shows nothing: the system takes nothing back here"
