"""Tasks with an owner."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from protocol.errors import ProtocolError, Reason
from protocol.tasks import TaskSet


async def test_what_takes_longer_than_it_is_waited_for_goes_on() -> None:
    tasks, may_end, ended = TaskSet(), asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        await may_end.wait()
        ended.set()

    await tasks.try_for(0.0, slow())
    assert not ended.is_set()
    may_end.set()
    async with asyncio.timeout(10):
        await ended.wait()
        await tasks.try_for(60.0, slow(), slow())
        await tasks.try_for(60.0)
    await tasks.stop()


async def test_what_the_network_does_is_logged_and_anything_else_is_a_failure() -> None:
    tasks = TaskSet()

    async def refused() -> None:
        raise ProtocolError(Reason.BUSY, "a peer")

    async def broken() -> None:
        raise KeyError("a mistake of ours")

    with capture_logs() as logs:
        await tasks.try_for(10.0, refused())
    assert [(log["event"], log["action"]) for log in logs] == [("will be tried again", "refused")]
    await tasks.try_for(10.0, broken())
    with pytest.raises(KeyError):
        async with asyncio.timeout(10):
            await tasks.wait()
    await tasks.stop()
