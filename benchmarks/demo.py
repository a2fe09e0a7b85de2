"""The main job on one machine: a seed and volunteers train the tiny model on real text, watched from outside.

Some of the volunteers may attack, and verifiers look for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any

from benchmarks.swarm import LocalSwarm, Process, SwarmError, local_swarm, watching, with_verifiers
from benchmarks.usage import Meter
from node.data import open_corpus, unigram_entropy
from node.observer import Observer
from protocol.identity import PeerId
from protocol.manifest import Manifest
from protocol.reports import Metrics
from protocol.votes import Verdict

_START_WITHIN = 120.0
_ROUND_WITHIN = 90.0
_CLOSING_ROUNDS = 5


@dataclass(frozen=True)
class Threat:
    """What the demo defends against: `malicious` attackers, and with how many verifiers.

    Attackers are replicas of the inner stages, spread evenly; where there are none, of the last stage.
    """

    verifiers: int = 0
    quorum: int = 2
    malicious: int = 0
    attack: str = "random-sign:0.3"
    direction: str = "both"
    start: int = 0

    def places(self, stages: int) -> set[tuple[int, int]]:
        """(stage, replica) of every attacker."""
        inner = range(1, stages - 1) or range(stages - 1, stages)
        return {(inner[number % len(inner)], number // len(inner)) for number in range(self.malicious)}

    @property
    def options(self) -> list[str]:
        """What an attacker joins with."""
        words = ["--attack", self.attack, "--attack-direction", self.direction]
        return [*words, "--attack-start", str(self.start)]


@dataclass(frozen=True)
class SeenBan:
    """A ban as the observer learnt of it, at round `round` of the run."""

    peer: PeerId
    round: int


@dataclass
class Pace:
    """How many rounds a second: the slope of the straight line (least squares) through what nodes have said of their
    versions. Each node's reports come at moments of its own. (Of a round's end alone one hears when somebody reports
    the next time: beside the nodes' own clocks that was off by 2% from run to run.)"""

    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _from: float = 0.0

    def note(self, at: float, version: int) -> None:
        """`at` in seconds, of any clock."""
        if not self._sums[0]:
            self._from = at
        at -= self._from
        for place, more in enumerate((1.0, at, version, at * at, at * version)):
            self._sums[place] += more

    @property
    def rounds_per_second(self) -> float:
        """0 as long as it cannot be told."""
        count, at, version, square, product = self._sums
        spread = count * square - at * at
        return (count * product - at * version) / spread if spread > 0 else 0.0


@dataclass
class DemoView:
    """What there is to show at a moment: for the live display, and at the end for the result."""

    manifest: Manifest
    swarm: LocalSwarm
    observer: Observer
    entropy: float
    threat: Threat = field(default_factory=Threat)
    bans: list[SeenBan] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    losses: list[float] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    heard: dict[PeerId, tuple[float, int]] = field(default_factory=dict)
    """When each volunteer last reported, and its version."""

    @property
    def tokens_per_second(self) -> float:
        batch = self.manifest.batch
        return batch.context * batch.sequences * batch.microbatches * self.pace.rounds_per_second

    @property
    def attackers(self) -> set[PeerId]:
        return {node.peer for node in self.swarm.nodes if node.is_attacker}

    @property
    def at_work(self) -> list[Process]:
        """The volunteers that are not banned."""
        banned = {ban.peer for ban in self.bans}
        return [node for node in self.swarm.nodes if node.peer not in banned]

    def note_metrics(self, peer: PeerId, metrics: Metrics) -> None:
        """How far a volunteer that is not banned has come since it reported last. The last round by itself does not
        count: nothing comes after it, and its end may wait for what was lost."""
        if all(node.peer != peer for node in self.at_work):
            return
        now = monotonic(), metrics.version
        before, self.heard[peer] = self.heard.get(peer, now), now
        if before[1] < min(metrics.version, self.manifest.schedule.rounds - 1):
            if before[1] == 0:
                self.pace.note(*before)
            self.pace.note(*now)

    def note_verdict(self, peer: PeerId, verdict: Verdict) -> None:
        if verdict is Verdict.BANNED:
            sightings = self.observer.sightings.values()
            now = max((sighting.metrics.version for sighting in sightings), default=0)
            self.bans.append(SeenBan(peer, now))

    def update(self) -> None:
        """Take in what the observer has heard since."""
        self.meter.read()
        rounds = self.manifest.schedule.rounds
        while len(self.losses) < rounds and (loss := self.observer.round_loss(len(self.losses))) is not None:
            if not self.losses:
                self.meter.start(self.swarm.processes)
            self.losses.append(loss)

    @property
    def is_over(self) -> bool:
        """Every round's loss is known and every volunteer that is not banned holds the run's last version."""
        rounds = self.manifest.schedule.rounds
        versions = [
            sighting.metrics.version
            for node in self.at_work
            if (sighting := self.observer.sightings.get(node.peer))
        ]
        return len(self.losses) >= rounds and len(versions) == len(self.at_work) and min(versions) >= rounds

    def result(self) -> dict[str, Any]:
        """The demo's JSON. Losses in nats a token; `final_loss` is the mean of the last five rounds."""
        self.meter.read(every=0.0)
        known = self.observer.sightings
        seen = {node.peer: known[node.peer].metrics for node in self.swarm.nodes if node.peer in known}
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
            "attackers": sorted(self.attackers),
            "bans": [self._ban(ban) for ban in self.bans],
            "false_bans": sum(ban.peer not in self.attackers for ban in self.bans),
            "microbatches_to_banned_after_ban": sum(metrics.to_banned for metrics in seen.values()),
            "flagged_fraction": _share(
                sum(metrics.refused.get("flagged", 0) for metrics in seen.values()),
                sum(metrics.guarded for metrics in seen.values()),
            ),
            "verification": self._verification(list(seen.values())),
            "cpu_seconds": self._cpu_seconds(list(seen.values())),
        }

    def _ban(self, ban: SeenBan) -> dict[str, Any]:
        """`rounds_to_ban` counts from the attack's start, the round of the ban included."""
        stages = {node.peer: node.stage for node in self.swarm.nodes}
        votes = self.observer.votes.votes_on(ban.peer, time())
        return {
            "peer": ban.peer,
            "stage": stages[ban.peer],
            "true_attacker": ban.peer in self.attackers,
            "rounds_to_ban": ban.round - self.threat.start + 1,
            "votes": [
                {
                    "verifier": verifier,
                    "verdict": one.vote.verdict,
                    "cause": one.vote.cause,
                    "text": one.vote.text,
                }
                for verifier, one in sorted(votes.items())
            ],
        }

    def _verification(self, metrics: list[Metrics]) -> dict[str, float]:
        """What verification cost, as shares of all microbatches, of the bytes that nodes sent and of their CPU time."""
        efforts = list(self.observer.efforts.values())
        asked = sum(effort.bytes for effort in efforts)
        seconds = self._cpu_seconds(metrics)
        passed = max((effort.passed for effort in efforts), default=0)
        return {
            "sampled_fraction": _share(sum(effort.sampled for effort in efforts), passed),
            "bytes_fraction": _share(asked, sum(one.sent_bytes for one in metrics) - asked),
            "cpu_fraction": _share(sum(seconds.values()) - seconds["nodes"], seconds["nodes"]),
        }

    def _cpu_seconds(self, metrics: list[Metrics]) -> dict[str, float]:
        """CPU time since the first round: all of the verifiers' processes, the guard in every node, work
        done again there, and what is left of the nodes' processes."""
        guard = sum(one.guard_seconds for one in metrics)
        redo = sum(one.redo_seconds for one in metrics)
        judging, nodes = self.meter.used(self.swarm.verifiers), self.meter.used(self.swarm.nodes)
        return {"verifiers": judging, "guard": guard, "redo": redo, "nodes": nodes - guard - redo}


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


async def run_demo(
    manifest: Manifest,
    folder: Path,
    *,
    replicas: int,
    threat: Threat | None = None,
    link_delay: float = 0.0,
    show: Callable[[DemoView], None] = lambda view: None,
) -> dict[str, Any]:
    """Train `manifest` to its last round with `replicas` volunteers a stage. Raises `SwarmError` if it stalls.

    `threat`: attackers among them, and verifiers. `show` is called whenever there is something new.
    """
    entropy, threat = unigram_entropy(open_corpus(manifest)), threat or Threat()
    manifest = with_verifiers(manifest, folder, threat.verifiers, threat.quorum)
    malicious = threat.places(manifest.stages.count)
    async with local_swarm(manifest, folder, link_delay=link_delay) as swarm:
        for _ in range(threat.verifiers):
            swarm.verify()
        for replica in range(replicas):
            for stage in range(manifest.stages.count):
                swarm.join(stage, *(threat.options if (stage, replica) in malicious else ()))
        async with watching(swarm) as observer:
            view = DemoView(manifest, swarm, observer, entropy, threat)
            observer.on_verdict, observer.on_metrics = view.note_verdict, view.note_metrics
            await _watch(view, show)
            return view.result()


async def _watch(view: DemoView, show: Callable[[DemoView], None]) -> None:
    patience = monotonic() + _START_WITHIN
    while not view.is_over:
        known = len(view.losses)
        await view.observer.wait_for_news(timeout=1.0)
        # It may know of its ban before we do.
        gone = [node for node in view.swarm.nodes if node.was_banned or node not in view.at_work]
        view.swarm.check_alive(but=gone)
        view.update()
        if len(view.losses) > known:
            patience = monotonic() + _ROUND_WITHIN
        if monotonic() > patience:
            tails = "\n".join(f"{node.name}:\n{node.tail(4)}" for node in view.swarm.nodes)
            raise SwarmError(
                f"round {len(view.losses)} did not end; the logs are in {view.swarm.folder}\n{tails}"
            )
        show(view)
