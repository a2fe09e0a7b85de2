"""Training is right: a swarm in the synchronous schedule is the same mathematics as one process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.reference import train_uncut
from tests.swarms import in_process_swarm, small_manifest

ROUNDS = 20


@pytest.mark.parametrize("replicas", [1, 2])
async def test_losses_equal_those_of_the_uncut_model(tmp_path: Path, replicas: int) -> None:
    manifest = small_manifest(rounds=ROUNDS, min_replicas=replicas)
    async with in_process_swarm(manifest, tmp_path) as swarm:
        await asyncio.gather(*(swarm.join(stage) for stage in range(3) for _ in range(replicas)))
        digests: dict[tuple[int, int], set[bytes]] = {}

        def all_rounds_done() -> bool:
            for one in swarm.volunteers:
                standing = one.replica.rounds.standing
                digests.setdefault((one.replica.stage, standing.version), set()).add(standing.digest)
            return all(one.replica.rounds.is_over for one in swarm.volunteers)

        await swarm.until(all_rounds_done, timeout=120, what="the last round")
        losses = swarm.round_losses()
        counts = [one.replica.pipeline.counts for one in swarm.volunteers]

    assert losses == pytest.approx(train_uncut(manifest, ROUNDS), rel=1e-3)
    assert {key: len(found) for key, found in digests.items()} == dict.fromkeys(digests, 1), (
        "replicas of a stage differ after a round"
    )
    assert sum(count["lost"] for count in counts) == 0
    if replicas == 2:
        assert all(count["microbatches"] for count in counts), "a replica did no work"


async def test_overlapped_uses_every_slot_once(tmp_path: Path) -> None:
    manifest = small_manifest(kind="overlapped", rounds=10)
    async with in_process_swarm(manifest, tmp_path) as swarm:
        await asyncio.gather(*(swarm.join(stage) for stage in range(3)))
        await swarm.until(
            lambda: all(one.replica.rounds.is_over for one in swarm.volunteers),
            what="the last round",
            timeout=120,
        )
        averaged = [one.replica.rounds.standing.averaged for one in swarm.volunteers]
        losses = swarm.round_losses()
    assert averaged == [10 * manifest.batch.microbatches] * 3
    assert losses[-1] < losses[0]


async def test_a_late_volunteer_takes_the_state_and_contributes(tmp_path: Path) -> None:
    manifest = small_manifest(rounds=10_000)
    async with in_process_swarm(manifest, tmp_path) as swarm:
        first = await asyncio.gather(*(swarm.join(stage) for stage in range(3)))
        await swarm.until(lambda: first[1].replica.rounds.version >= 3, what="three rounds")
        late = await swarm.join(1)
        assert late.replica.rounds.version >= 3
        await swarm.until(
            lambda: late.replica.pipeline.counts["microbatches"] >= 4, what="work for the late volunteer"
        )
        version = late.replica.rounds.version
        await swarm.until(
            lambda: min(late.replica.rounds.version, first[1].replica.rounds.version) > version + 1,
            what="two more rounds",
        )
        await swarm.until(
            lambda: (
                late.replica.rounds.standing.version == first[1].replica.rounds.standing.version
                and late.replica.rounds.standing.digest == first[1].replica.rounds.standing.digest
            ),
            what="equal state digests",
        )
