"""Fixtures of tests in which a node has neighbours."""

from __future__ import annotations

import asyncio

import pytest_asyncio

from tests.conftest import StartHost
from tests.node.neighbours import Place


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def places(start_host: StartHost) -> list[Place]:
    """Four p2pds, for all tests of a module: for a node, its head, its tail, and somebody else."""

    async def one() -> Place:
        host, identity = await start_host()
        return Place(host, identity, await host.addresses())

    return list(await asyncio.gather(*(one() for _ in range(4))))
