"""What tests of several packages share: hypothesis's profile, and p2pd daemons on loopback."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from protocol.host import LOOPBACK, Host
from protocol.identity import Identity

# The machine may be busy: no deadline. The same examples every time: a red run can be repeated.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

StartHost = Callable[..., Awaitable[tuple[Host, Identity]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[StartHost]:
    """Starts a p2pd on loopback with a new identity; all of them are stopped at the module's end."""
    folder = tmp_path_factory.mktemp("keys")
    hosts: list[Host] = []
    numbers = itertools.count()

    async def start(seeds: tuple[str, ...] = ()) -> tuple[Host, Identity]:
        path = folder / f"{next(numbers)}.key"
        identity = Identity.load_or_create(path)
        hosts.append(await Host.start(path, listen=LOOPBACK, seeds=seeds))
        return hosts[-1], identity

    try:
        yield start
    finally:
        await asyncio.gather(*(host.stop() for host in hosts), return_exceptions=True)
