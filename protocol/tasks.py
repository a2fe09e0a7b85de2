"""Tasks with an owner: they end with it, and none of a peer's main ones fails unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import structlog

from protocol.errors import ProtocolError

log = structlog.get_logger("tasks")

_Coroutine: TypeAlias = Coroutine[Any, Any, None]


class Background:
    """Tasks that nobody waits for, until their owner stops."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Future[None]] = set()

    def spawn(self, work: Awaitable[None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class TaskSet(Background):
    """The tasks of a peer. `wait` raises the first error that one of them did not handle itself."""

    def __init__(self) -> None:
        super().__init__()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def every(self, seconds: float, action: Callable[[], _Coroutine]) -> None:
        """Again and again; what the network does to one turn is logged, and the next one tried."""

        async def repeat() -> None:
            while True:
                await _try(action())
                await asyncio.sleep(seconds)

        self.spawn(repeat())

    async def try_for(self, seconds: float, *works: _Coroutine) -> None:
        """All at once, until they are done, but no longer than `seconds`: what is not done then goes on without us.
        What the network does to one of them is logged."""
        if tasks := [self.spawn(_try(work)) for work in works]:
            await asyncio.wait(tasks, timeout=seconds)

    def _on_done(self, task: asyncio.Future[None]) -> None:
        super()._on_done(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not self._failure.done():
            self._failure.set_exception(error)

    async def wait(self) -> None:
        """For ever, or until a task fails: raises its error."""
        await asyncio.shield(self._failure)

    async def stop(self) -> None:
        await super().stop()
        self._failure.cancel()


async def _try(work: _Coroutine) -> None:
    try:
        await work
    except (ProtocolError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        log.warning("will be tried again", action=getattr(work, "__name__", ""), reason=str(error))


async def wait_for(event: asyncio.Event, timeout: float) -> None:
    """Until the event is set, or `timeout` seconds; clears it."""
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return
    finally:
        event.clear()
