"""The heap: memory that was never touched is slow to get, since the kernel clears every page of it, and in a virtual
machine the host must give it first. So a node keeps what it frees, and touches what it will need before it serves, in
huge pages where it may: those are 512 times fewer to get, and to get again when a library gives all that is free back
(protobuf does, with malloc_trim).
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import numpy as np

# Parameters of glibc's `mallopt` (mallopt(3)).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MOST_FREE = 1 << 30
"""Bytes at the heap's end that may be free; of more, the system gets them back."""
_LARGEST = 32 << 20
"""Bytes of the largest piece that the heap is to hold, as many as glibc allows: what is larger comes from the system
and goes back as soon as it is free."""
_PIECE = _LARGEST - (1 << 20)
"""Bytes that are touched at once: with what malloc adds to them, no more than the largest."""


def keep_freed() -> None:
    """Have this process keep what it frees, in one heap for all of its threads. To be called before any is started: the
    heaps of those that there are by then are given to later ones, too. Of glibc alone; elsewhere it does nothing."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (_MMAP_THRESHOLD, _LARGEST),
            (_TRIM_THRESHOLD, _MOST_FREE),
            (_ARENA_MAX, 1),
        ):
            mallopt(parameter, value)


def touch(size: int) -> None:
    """Have `size` bytes in the heap of the thread that calls this. After `keep_freed`."""
    sizes = [min(_PIECE, size - start) for start in range(0, size, _PIECE)]
    pieces = [np.empty(one, dtype=np.uint8) for one in sizes]
    for piece in pieces:
        _prefer_huge_pages(piece.ctypes.data, piece.nbytes)
        piece.fill(1)


def _prefer_huge_pages(start: int, size: int) -> None:
    """For the pages that it is in, from now on, whoever uses them (madvise(2)). Of Linux alone; elsewhere it does
    nothing."""
    first = start - start % mmap.PAGESIZE
    with suppress(OSError, AttributeError):
        madvise, kind = ctypes.CDLL(None).madvise, mmap.MADV_HUGEPAGE
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), kind)
