"""Attackers among real processes are caught, banned by a quorum and routed around; nobody else is."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from benchmarks.swarm import LocalSwarm, Process, local_swarm, until, watching, with_verifiers
from node.observer import Observer
from protocol.errors import BannedError
from protocol.manifest import Manifest
from protocol.votes import Verdict
from tests.swarms import small_manifest

STAGES, REPLICAS, VERIFIERS, QUORUM = 3, 3, 3, 2
START = 4
SLOW = (2, 2)
BANNED = BannedError.exit_code


def defended(folder: Path) -> Manifest:
    manifest = small_manifest(kind="overlapped", rounds=100_000, min_replicas=REPLICAS, testbed=True)
    return with_verifiers(manifest, folder, VERIFIERS, QUORUM)


def populate(swarm: LocalSwarm, attack: str | None, direction: str = "both") -> Process | None:
    """Verifiers, and three replicas of each stage, of which one of stage 1 may be an attacker.

    An honest replica of the last stage is slow: it takes 150 ms to send anything.
    """
    for _ in range(VERIFIERS):
        swarm.verify()
    options = ["--attack", attack or "", "--attack-direction", direction, "--attack-start", str(START)]
    for replica in range(REPLICAS):
        for stage in range(STAGES):
            slow = ("--link-delay", "150") if (stage, replica) == SLOW else ()
            swarm.join(stage, *slow, *(options if attack and (stage, replica) == (1, 0) else ()))
    return next((node for node in swarm.nodes if node.is_attacker), None)


def newest(observer: Observer) -> int:
    return max((sighting.metrics.version for sighting in observer.sightings.values()), default=-1)


async def rounds_go_on(observer: Observer, what: str, count: int = 5) -> None:
    start = newest(observer)
    await until(observer, lambda: newest(observer) >= start + count, timeout=120, what=f"more rounds {what}")


def has_sampled(observer: Observer) -> bool:
    return sum(effort.sampled for effort in observer.efforts.values()) > 0


def banned(observer: Observer) -> list[str]:
    verdicts = observer.votes.verdicts()
    return [peer for peer, verdict in verdicts.items() if verdict is Verdict.BANNED]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("attack", "direction"),
    [
        ("zeros", "activation"),
        pytest.param("random-sign:0.3", "gradient", marks=pytest.mark.slow),
        pytest.param("delay:20", "activation", marks=pytest.mark.slow),
    ],
)
async def test_the_attacker_is_banned_and_nobody_else(tmp_path: Path, attack: str, direction: str) -> None:
    async with local_swarm(defended(tmp_path), tmp_path) as swarm, watching(swarm) as observer:
        attacker = populate(swarm, attack, direction)
        assert attacker is not None
        await until(observer, lambda: bool(banned(observer)), timeout=300, what="a ban")
        assert banned(observer) == [attacker.peer]
        votes = observer.votes.bans(0.0)[attacker.peer]
        assert len(votes) >= QUORUM and {one.vote.stage for one in votes.values()} == {1}

        await asyncio.to_thread(attacker.process.join, 30)
        assert attacker.process.exitcode == BANNED
        line = attacker.tail(1)
        for part in ("is banned", "did it again", "until", "operator"):
            assert part in line
        assert sum(verifier in line for verifier in swarm.signed.electorate.verifiers) >= QUORUM

        await rounds_go_on(observer, "without the attacker")
        again = swarm.join(1, name=attacker.name)
        await asyncio.to_thread(again.process.join, 60)
        assert again.process.exitcode == BANNED, "it came back"
        newcomer = swarm.join(1)
        await until(observer, lambda: newcomer.peer in observer.sightings, timeout=60, what="the newcomer")
        await rounds_go_on(observer, "with a newcomer", 3)
        assert banned(observer) == [attacker.peer]
        assert sum(sighting.metrics.to_banned for sighting in observer.sightings.values()) == 0
        swarm.check_alive(but=[attacker, again])


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_who_keeps_half_of_its_work_does_not_hold_up_the_run(tmp_path: Path) -> None:
    """That cannot be proved of anybody, so nobody is banned; the others soon leave it alone."""
    async with local_swarm(defended(tmp_path), tmp_path) as swarm, watching(swarm) as observer:
        attacker = populate(swarm, "withhold:0.5")
        await until(observer, lambda: newest(observer) >= START, timeout=120, what="the attack")
        assert attacker is not None
        culprit = attacker.peer
        await until(
            observer, lambda: bool(observer.shunned_by(culprit)), timeout=60, what="who leaves it alone"
        )
        # Those who wait a minute for each that is kept take minutes for these.
        await rounds_go_on(observer, "past who keeps half of what it gets", 60)
        assert not banned(observer)
        swarm.check_alive()


async def hiccup(process: Process) -> None:
    """Until cancelled: stop the process for a moment, again and again."""
    while True:
        await asyncio.sleep(1.5)
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(0.4)
        process.signal(signal.SIGCONT)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
async def test_without_an_attacker_nobody_is_held_to_be_one(tmp_path: Path, rounds: int) -> None:
    """One node is slow and jittery, and a verifier dies meanwhile; the others go on, and the run does not notice."""
    async with local_swarm(defended(tmp_path), tmp_path) as swarm, watching(swarm) as observer:
        populate(swarm, None)
        await until(
            observer,
            lambda: newest(observer) >= 10 and len(observer.efforts) == VERIFIERS,
            timeout=200,
            what="ten rounds, and each verifier",
        )
        swarm.verifiers[0].kill()
        (slow,) = [node for node in swarm.nodes if node.name == f"node{STAGES * REPLICAS}-stage{SLOW[0]}"]
        hiccups = asyncio.create_task(hiccup(slow))
        try:
            await until(
                observer,
                lambda: newest(observer) >= rounds and has_sampled(observer),
                timeout=1000,
                what=f"{rounds} rounds, and samples",
            )
        finally:
            hiccups.cancel()
            await asyncio.gather(hiccups, return_exceptions=True)
        assert slow.peer in observer.sightings
        serious = {
            peer: verdict
            for peer, verdict in observer.votes.verdicts().items()
            if verdict is not Verdict.SUSPECT
        }
        assert not serious
        metrics = [sighting.metrics for sighting in observer.sightings.values()]
        assert sum(one.refused.get("flagged", 0) for one in metrics) <= 0.005 * sum(
            one.guarded for one in metrics
        )
        assert has_sampled(observer)
        assert len(observer.efforts) == VERIFIERS
        swarm.check_alive(but=swarm.verifiers[:1])
