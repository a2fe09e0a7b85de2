"""A verifier peer among nodes that stall, over real p2pd daemons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from time import time

import pytest
import pytest_asyncio

from protocol import ballots
from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.links import Answer, Link
from protocol.manifest import VerificationSection
from protocol.samples import SAMPLE_LIST, SAMPLE_SHOW
from tests.protocol.ballots import PEERS, VERIFIERS, ban
from tests.swarms import InProcessSwarm, in_process_swarm, small_manifest
from verifier import inquirer, service
from verifier.service import Verifier, VerifierConfig

pytestmark = pytest.mark.timeout(120)

STAGES = 2


@pytest_asyncio.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[InProcessSwarm]:
    key = Identity.load_or_create(tmp_path / "verifier.key")
    names = (key.peer_id, *(one.peer_id for one in VERIFIERS[:2]))
    policy = VerificationSection(verifiers=names, quorum=2, sampling=1.0)
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


async def test_a_node_and_a_verifier_learn_votes_of_each_other_as_one_listens(
    swarm: InProcessSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gossip, and without comparing at random."""
    monkeypatch.setattr(ballots, "COMPARE_EVERY", 600.0)
    monkeypatch.setattr(ballots, "COMPARE_AGAIN", 0.1)
    monkeypatch.setattr(service, "LISTEN_EVERY", 0.5)
    node = await swarm.join(0)
    verifier = Verifier(VerifierConfig(swarm.invite, swarm.folder / "verifier.key", LOOPBACK))
    try:
        await verifier.start()
        await swarm.until(lambda: any(one.heard_at for one in verifier._nodes.values()), what="a list")
        ban(node.replica.votes, PEERS[0], VERIFIERS[:2], time())
        ban(verifier.votes, PEERS[1], VERIFIERS[:2], time())
        for name, votes in (("the verifier", verifier.votes), ("the node", node.replica.votes)):
            await swarm.until(
                lambda votes=votes: all(map(votes.is_banned, PEERS[:2])), what=f"{name} to know"
            )
    finally:
        await verifier.stop()
