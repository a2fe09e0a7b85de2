"""The heap: memory that was never touched is slow to get, since the kernel clears every page of it, and in a virtual
machine the host must give it first. So a node keeps what it frees, and touches what it will need before it serves.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import numpy as np

# Parameters of glibc's `mallopt` (mallopt(3)).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MOST_FREE = 1 << 30
"""Bytes at the heap's end that may be free; of more, the system gets them back."""
_LARGEST = 32 << 20
"""Bytes of the largest piece that the heap is to hold, as many as glibc allows: what is larger comes from the system
and goes back as soon as it is free."""
_PIECE = 1 << 20


def keep_freed() -> None:
    """Have this process keep what it frees, in one heap for all threads that it starts from now on. Of glibc alone;
    elsewhere it does nothing."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (_MMAP_THRESHOLD, _LARGEST),
            (_TRIM_THRESHOLD, _MOST_FREE),
            (_ARENA_MAX, 1),
        ):
            mallopt(parameter, value)


def touch(size: int) -> None:
    """Have `size` bytes in the heap of the thread that calls this, rounded down to whole MiB. After `keep_freed`."""
    pieces = [np.ones(_PIECE, dtype=np.uint8) for _ in range(size // _PIECE)]
    pieces.clear()
