"""A verifier peer among nodes that stall, over real p2pd daemons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.links import Answer, Link
from protocol.manifest import VerificationSection
from protocol.samples import SAMPLE_LIST, SAMPLE_SHOW
from tests.swarms import InProcessSwarm, in_process_swarm, small_manifest
from verifier import inquirer, service
from verifier.service import Verifier, VerifierConfig

pytestmark = pytest.mark.timeout(120)

STAGES = 2


@pytest_asyncio.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[InProcessSwarm]:
    key = Identity.load_or_create(tmp_path / "verifier.key")
    policy = VerificationSection(verifiers=(key.peer_id,), quorum=1, sampling=1.0)
    manifest = small_manifest(kind="overlapped", stages=STAGES, rounds=100_000, verification=policy)
    async with in_process_swarm(manifest, tmp_path) as swarm:
        yield swarm


@pytest.mark.parametrize("method", [SAMPLE_LIST, SAMPLE_SHOW])
async def test_who_stalls_keeps_nobody_else_from_being_looked_at(
    swarm: InProcessSwarm, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its question is open, the other is asked again what has passed, and samples are asked for."""
    monkeypatch.setattr(inquirer, "ANSWER_WITHIN", 600.0)
    monkeypatch.setattr(service, "LISTEN_EVERY", 0.5)
    monkeypatch.setattr(service, "PATIENCE", 0.1)
    await asyncio.gather(*(swarm.join(stage) for stage in range(STAGES)))
    stalling, other = swarm.volunteers
    is_asked, forever = asyncio.Event(), asyncio.Event()

    async def stall(link: Link, body: bytes, payload: memoryview) -> Answer:
        is_asked.set()
        await forever.wait()
        return b"", memoryview(b"")

    verifier = Verifier(VerifierConfig(swarm.invite, swarm.folder / "verifier.key", LOOPBACK))
    try:
        await verifier.start()
        await swarm.until(lambda: verifier.judge.counts["sampled"] > 0, what="a panel")
        stalling.replica.switchboard.methods[method] = stall
        async with asyncio.timeout(30):
            await is_asked.wait()
        heard_at, sampled = set(), verifier.judge.counts["sampled"]

        def goes_on() -> bool:
            heard_at.add(verifier._nodes[other.peer_id].heard_at)
            return len(heard_at) > 2 and (method == SAMPLE_LIST or verifier.judge.counts["sampled"] > sampled)

        await swarm.until(goes_on, what="the other to be listened to twice more, and another panel")
    finally:
        forever.set()
        await verifier.stop()
