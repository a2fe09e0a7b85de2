"""The one thread that runs torch. Jobs wait in order of urgency; the event loop never computes."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

T = TypeVar("T")


class Urgency(IntEnum):
    """What goes first. A backward pass frees memory here and credits upstream, so it precedes new work."""

    ROUND = 0
    BACKWARD = 1
    FORWARD = 2
    INJECT = 3
    STOP = 9


class ComputeThread:
    """`await run(urgency, function)` runs it on the thread. What waits is bounded by who asks: credits, and one round.

    `busy_seconds` is the time spent computing.
    """

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    async def run(self, urgency: Urgency, function: Callable[..., T], *args: Any) -> T:
        """The function's result, or what it raised."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            if result.cancelled():
                return
            try:
                value = function(*args)
            except BaseException as error:  # noqa: BLE001 - it is handed to who awaits
                _tell(loop, result, partial(result.set_exception, error))
            else:
                _tell(loop, result, partial(result.set_result, value))

        self._jobs.put((urgency, next(self._order), job))
        return await result

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def stop(self) -> None:
        """End after the job in progress; the thread holds no resource that outlives the process."""
        self._jobs.put((Urgency.STOP, next(self._order), lambda: None))

    def _work(self) -> None:
        while True:
            urgency, _, job = self._jobs.get()
            if urgency == Urgency.STOP:
                return
            began = perf_counter()
            job()
            self.busy_seconds += perf_counter() - began


def _tell(loop: asyncio.AbstractEventLoop, result: asyncio.Future[Any], tell: Callable[[], None]) -> None:
    def told() -> None:
        if not result.done():
            tell()

    # The loop may have closed while the job ran: then nobody waits.
    if not loop.is_closed():
        loop.call_soon_threadsafe(told)
