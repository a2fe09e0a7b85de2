"""A small swarm inside the test's own process: a real seed, real volunteers, real p2pd daemons on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bootstrap.seed import Seed
from node.volunteer import Volunteer, VolunteerConfig
from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.manifest import (
    BatchSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    SignedManifest,
    StagesSection,
)


def small_manifest(
    *, kind: str = "synchronous", stages: int = 3, rounds: int = 20, min_replicas: int = 1, **changes: Any
) -> Manifest:
    """A Llama of one layer a stage, width 32, context 32; 4 microbatches a round."""
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": stages,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    content: dict[str, Any] = {
        "name": "test",
        "seed": 7,
        "data": "builtin:pydoc",
        "model": ModelSection(config=config),
        "stages": StagesSection(cut=tuple(range(stages + 1))),
        "batch": BatchSection(context=32, sequences=2, microbatches=4),
        "optimizer": OptimizerSection(lr=3e-3, warmup_rounds=2),
        "schedule": ScheduleSection(kind=kind, rounds=rounds, min_replicas=min_replicas),
    }
    return Manifest(**{**content, **changes})


@dataclass
class InProcessSwarm:
    folder: Path
    signed: SignedManifest
    invite: Invite
    volunteers: list[Volunteer] = field(default_factory=list)

    async def join(self, stage: int, **options: Any) -> Volunteer:
        """Start a volunteer and wait until it serves."""
        name = f"node{len(self.volunteers)}"
        config = VolunteerConfig(
            invite=self.invite,
            identity=self.folder / f"{name}.key",
            cache_dir=self.folder / name,
            stage=stage,
            device="cpu",
            listen=LOOPBACK,
            **options,
        )
        volunteer = Volunteer(config)
        self.volunteers.append(volunteer)
        await volunteer.start()
        return volunteer

    def round_losses(self) -> list[float]:
        """Mean loss of each finished round, from what the tails have seen."""
        size = self.signed.manifest.batch.microbatches
        last = self.signed.manifest.stages.count - 1
        seen: dict[int, float] = {}
        for volunteer in self.volunteers:
            if volunteer.replica.stage == last:
                seen |= self.recorded.get(volunteer.peer_id, {}) | volunteer.replica.pipeline.losses
                self.recorded[volunteer.peer_id] = dict(seen)
        rounds = []
        while all(slot in seen for slot in range(len(rounds) * size, (len(rounds) + 1) * size)):
            slots = range(len(rounds) * size, (len(rounds) + 1) * size)
            rounds.append(sum(seen[slot] for slot in slots) / size)
        return rounds

    recorded: dict[str, dict[int, float]] = field(default_factory=dict)

    async def until(self, is_done: Callable[[], bool], *, timeout: float = 60.0, what: str) -> None:
        """Look 20 times a second. Fails with what every volunteer was doing."""
        deadline = monotonic() + timeout
        while not is_done():
            self.round_losses()  # Volunteers forget the losses of old rounds.
            if monotonic() > deadline:
                doing = "\n".join(
                    f"stage {one.replica.stage}: {one.snapshot().metrics}" for one in self.volunteers
                )
                raise AssertionError(f"waited {timeout} s for {what}; the volunteers:\n{doing}")
            await asyncio.sleep(0.05)


@asynccontextmanager
async def in_process_swarm(manifest: Manifest, folder: Path) -> AsyncIterator[InProcessSwarm]:
    torch.set_num_threads(1)  # Several compute threads share this process.
    signed = SignedManifest.sign(manifest, Identity.generate())
    seed = Seed(signed, folder / "seed.key", LOOPBACK)
    swarm = None
    try:
        swarm = InProcessSwarm(folder, signed, await seed.start())
        yield swarm
    finally:
        if swarm is not None:
            await asyncio.gather(*(one.stop() for one in swarm.volunteers))
        await seed.stop()
