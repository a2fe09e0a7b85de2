"""Running something asynchronous until it ends, or until Ctrl-C or SIGTERM asks it to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM cut short before it had its result."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop. Ctrl-C and SIGTERM are for `main` to handle, with `stop_asked`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def run_long(main: Coroutine[Any, Any, T]) -> T:
    """As `run`, for a process that computes for hours: it keeps the memory that it frees, and neither it nor the
    processes that it starts take the processor from one another before their turns are over (sched(7), SCHED_BATCH;
    Linux alone). Where processors are few, most of their switches are such, and each empties the caches."""
    from node.heap import keep_freed

    keep_freed()
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return run(main)


def use_threads(count: int) -> None:
    """Compute with `count` threads, and give p2pd as many (Go's GOMAXPROCS) unless the environment says otherwise; 0:
    both decide by themselves. Before p2pd starts.

    With more than it needs, p2pd's threads pass work to and fro: with one there are 40% fewer switches between all
    processes of a run on two processors.
    """
    import torch

    if count:
        torch.set_num_threads(count)
        os.environ.setdefault("GOMAXPROCS", str(count))


def stop_asked() -> asyncio.Event:
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the process at once."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> None:
        asked.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    return asked


async def until_asked(asked: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if `asked` came first; it was cancelled then, and has cleaned up."""
    working, asking = asyncio.ensure_future(work), asyncio.ensure_future(asked.wait())
    await asyncio.wait({working, asking}, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
        return None
    return working.result()


async def interruptible(work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if Ctrl-C or SIGTERM cut it short; it has cleaned up then."""
    return await until_asked(stop_asked(), work)
