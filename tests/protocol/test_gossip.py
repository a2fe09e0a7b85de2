"""Gossip through a real p2pd: what is published arrives, over one connection that is replaced when it fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from protocol import gossip
from protocol.errors import ProtocolError, Reason
from protocol.gossip import Publisher
from protocol.host import Host
from tests.conftest import StartHost

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


class _Heard:
    """What one host hears on a topic of its own."""

    def __init__(self) -> None:
        self._messages: list[bytes] = []
        self._changed = asyncio.Event()

    def take(self, author: str, data: bytes) -> None:
        self._messages.append(data)
        self._changed.set()

    async def wait_for(self, count: int) -> list[bytes]:
        async with asyncio.timeout(20):
            while len(self._messages) < count:
                self._changed.clear()
                await self._changed.wait()
        return sorted(self._messages)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a connection to p2pd was opened."""
    count, open_one = [0], gossip._open

    async def counting(*arguments: Any) -> Any:
        count[0] += 1
        return await open_one(*arguments)

    monkeypatch.setattr(gossip, "_open", counting)
    return count


async def _listening(host: Host, topic: str) -> _Heard:
    heard = _Heard()
    await host.subscribe(topic, heard.take)
    return heard


async def test_all_that_is_published_at_once_arrives_over_one_connection(
    start_host: StartHost, opened: list[int]
) -> None:
    host, _ = await start_host()
    heard = await _listening(host, "many")
    before = opened[0]
    messages = [bytes([number]) * 1000 for number in range(20)]
    publisher = Publisher(host.p2p)
    await asyncio.gather(*(publisher.publish("many", message) for message in messages))
    publisher.close()
    assert await heard.wait_for(len(messages)) == messages
    assert opened[0] - before == 1


async def test_after_a_failure_the_next_message_takes_a_new_connection(
    start_host: StartHost, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = await start_host()
    heard = await _listening(host, "broken")
    before = opened[0]
    publisher = Publisher(host.p2p)
    await publisher.publish("broken", b"one")

    async def cut(*arguments: Any) -> None:
        raise asyncio.IncompleteReadError(b"", 1)

    with monkeypatch.context() as patch:
        patch.setattr(gossip, "read_pbmsg_safe", cut)
        with pytest.raises(ProtocolError) as failure:
            await publisher.publish("broken", b"two")
    assert failure.value.reason is Reason.UNREACHABLE
    await publisher.publish("broken", b"three")
    publisher.close()
    # The second one did leave: only p2pd's answer was not read, and is not taken for that to the third.
    assert await heard.wait_for(3) == [b"one", b"three", b"two"]
    assert opened[0] - before == 2


async def test_messages_that_are_read_into_one_are_told_apart(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossip, "_REUSED", 1000)
    host, _ = await start_host()
    heard = await _listening(host, "reused")
    messages = [bytes([number]) * (1 + 100 * (number % 3)) for number in range(40)]
    for number, message in enumerate(messages, 1):
        await host.publish("reused", message)
        # One after another: p2pd drops what comes while 32 wait for us.
        await heard.wait_for(number)
    assert await heard.wait_for(len(messages)) == sorted(messages)
