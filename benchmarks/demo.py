"""The main job on one machine: a seed and volunteers train the tiny model on real text, watched from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.swarm import LocalSwarm, SwarmError, local_swarm, watching
from node.data import open_corpus, unigram_entropy
from node.observer import Observer
from protocol.manifest import Manifest

_START_WITHIN = 120.0
_ROUND_WITHIN = 90.0
_CLOSING_ROUNDS = 5


@dataclass
class DemoView:
    """What there is to show at a moment: for the live display, and at the end for the result."""

    manifest: Manifest
    swarm: LocalSwarm
    observer: Observer
    entropy: float
    losses: list[float] = field(default_factory=list)
    closed_at: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Over all rounds but the first, which the last volunteers may have entered late."""
        if len(self.closed_at) < 2:
            return 0.0
        batch = self.manifest.batch
        tokens = batch.context * batch.sequences * batch.microbatches * (len(self.closed_at) - 1)
        return tokens / (self.closed_at[-1] - self.closed_at[0])

    def update(self) -> None:
        """Take in what the observer has heard since."""
        while (loss := self.observer.round_loss(len(self.losses))) is not None:
            self.losses.append(loss)
            self.closed_at.append(monotonic())

    @property
    def is_over(self) -> bool:
        """Every round's loss is known and every volunteer holds the run's last version."""
        rounds = self.manifest.schedule.rounds
        versions = [
            sighting.metrics.version
            for node in self.swarm.nodes
            if (sighting := self.observer.sightings.get(node.peer))
        ]
        return (
            len(self.losses) >= rounds and len(versions) == len(self.swarm.nodes) and min(versions) >= rounds
        )

    def result(self) -> dict[str, Any]:
        """The demo's JSON. Losses in nats a token; `final_loss` is the mean of the last five rounds."""
        seen = {node.peer: self.observer.sightings[node.peer].metrics for node in self.swarm.nodes}
        closing = self.losses[-_CLOSING_ROUNDS:]
        return {
            "schedule": self.manifest.schedule.kind,
            "stages": self.manifest.stages.count,
            "rounds": len(self.losses),
            "initial_loss": self.losses[0],
            "final_loss": sum(closing) / len(closing),
            "unigram_entropy": self.entropy,
            "tokens_per_second": self.tokens_per_second,
            "lost_microbatches": sum(metrics.lost for metrics in seen.values()),
            "rerouted_microbatches": sum(metrics.rerouted for metrics in seen.values()),
            "losses": self.losses,
            "peers": [
                {
                    "peer": peer,
                    "stage": metrics.stage,
                    "microbatches": metrics.microbatches,
                    "weights_version": metrics.version,
                    "state_digest": metrics.digest.hex(),
                }
                for peer, metrics in sorted(seen.items(), key=lambda item: (item[1].stage, item[0]))
            ],
        }


async def run_demo(
    manifest: Manifest,
    folder: Path,
    *,
    replicas: int,
    link_delay: float = 0.0,
    show: Callable[[DemoView], None] = lambda view: None,
) -> dict[str, Any]:
    """Train `manifest` to its last round with `replicas` volunteers a stage. Raises `SwarmError` if it stalls.

    `show` is called whenever there is something new.
    """
    entropy = unigram_entropy(open_corpus(manifest))
    async with local_swarm(manifest, folder, link_delay=link_delay) as swarm:
        for _ in range(replicas):
            for stage in range(manifest.stages.count):
                swarm.join(stage)
        async with watching(swarm) as observer:
            view = DemoView(manifest, swarm, observer, entropy)
            await _watch(view, show)
            return view.result()


async def _watch(view: DemoView, show: Callable[[DemoView], None]) -> None:
    patience = monotonic() + _START_WITHIN
    while not view.is_over:
        known = len(view.losses)
        await view.observer.wait_for_news(timeout=1.0)
        view.swarm.check_alive()
        view.update()
        if len(view.losses) > known:
            patience = monotonic() + _ROUND_WITHIN
        if monotonic() > patience:
            tails = "\n".join(f"{node.name}:\n{node.tail(4)}" for node in view.swarm.nodes)
            raise SwarmError(
                f"round {len(view.losses)} did not end; the logs are in {view.swarm.folder}\n{tails}"
            )
        show(view)
