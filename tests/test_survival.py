"""The run survives what happens to volunteers: real processes, killed and stopped while they train."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.swarm import LocalSwarm, Process, local_swarm, until, watching
from node.observer import Observer
from node.patience import FLIGHT_TIMEOUT
from tests.swarms import small_manifest

STAGES, REPLICAS = 3, 2
PATIENCE = 2 * FLIGHT_TIMEOUT
"""Seconds: what was lost without a trace is given up after one flight's time, and a busy machine needs more."""


def versions(observer: Observer, nodes: Sequence[Process]) -> list[int]:
    """The weights versions that these nodes last reported; -1 for one not heard of."""
    seen = (observer.sightings.get(node.peer) for node in nodes)
    return [sighting.metrics.version if sighting else -1 for sighting in seen]


async def rounds_go_on(observer: Observer, nodes: Sequence[Process], what: str) -> None:
    """Every one of `nodes` closes three more rounds."""
    start = max(versions(observer, nodes))
    await until(
        observer,
        lambda: min(versions(observer, nodes)) >= start + 3,
        timeout=PATIENCE,
        what=f"three more rounds {what}",
    )


async def works(observer: Observer, node: Process) -> None:
    """A newcomer holds the state and has done microbatches."""

    def has_worked() -> bool:
        sighting = observer.sightings.get(node.peer)
        return sighting is not None and sighting.metrics.microbatches > 0 and sighting.metrics.version > 0

    await until(observer, has_worked, timeout=PATIENCE, what=f"work of {node.name}")


def total(observer: Observer, name: str) -> int:
    return sum(getattr(sighting.metrics, name) for sighting in observer.sightings.values())


async def full_swarm(swarm: LocalSwarm, observer: Observer) -> dict[int, list[Process]]:
    nodes = {stage: [swarm.join(stage) for _ in range(REPLICAS)] for stage in range(STAGES)}
    await until(
        observer, lambda: min(versions(observer, swarm.nodes)) >= 2, timeout=120, what="the first two rounds"
    )
    return nodes


@pytest.mark.timeout(800)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
async def test_a_replica_of_each_stage_is_lost_in_turn(tmp_path: Path, number: signal.Signals) -> None:
    manifest = small_manifest(kind="overlapped", rounds=100_000, min_replicas=REPLICAS)
    async with local_swarm(manifest, tmp_path) as swarm, watching(swarm) as observer:
        nodes = await full_swarm(swarm, observer)
        lost: list[Process] = []
        for stage in range(STAGES):
            lost.append(nodes[stage][0])
            lost[-1].signal(number)
            survivors = [node for node in swarm.nodes if node not in lost]
            await rounds_go_on(observer, survivors, f"without a replica of stage {stage}")
        assert total(observer, "rerouted") + total(observer, "lost") > 0, "nothing was in flight to the lost"

        newcomers = [swarm.join(stage) for stage in range(STAGES)]
        for newcomer in newcomers:
            await works(observer, newcomer)
        alive = [node for node in swarm.nodes if node not in lost]
        await rounds_go_on(observer, alive, "with newcomers")
        swarm.check_alive(but=lost)


@pytest.mark.timeout(800)
async def test_a_stage_without_replicas_waits_and_the_seed_is_not_needed(tmp_path: Path) -> None:
    manifest = small_manifest(kind="synchronous", rounds=100_000)
    async with local_swarm(manifest, tmp_path) as swarm, watching(swarm) as observer:
        nodes = [swarm.join(stage) for stage in range(STAGES)]
        lost: list[Process] = []
        await until(
            observer, lambda: min(versions(observer, nodes)) >= 2, timeout=120, what="the first two rounds"
        )
        for stage in range(STAGES):
            lost.append(nodes[stage])
            lost[-1].kill()
            others = [node for node in nodes if node not in lost]
            await until(
                observer,
                lambda stage=stage, others=others: any(
                    observer.sightings[node.peer].metrics.waiting_for == stage for node in others
                ),
                timeout=PATIENCE,
                what=f"somebody to say that it waits for stage {stage}",
            )
            nodes[stage] = swarm.join(stage)
            await works(observer, nodes[stage])
            await rounds_go_on(observer, nodes, f"after the lost stage {stage} was served again")

        await observer.meet()
        assert swarm.seed is not None
        swarm.seed.kill()
        await rounds_go_on(observer, nodes, "without the bootstrap peer")
        swarm.check_alive(but=[*lost, swarm.seed])
