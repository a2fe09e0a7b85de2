"""How fast a swarm on this machine trains, next to the same model uncut in one process on the same cores."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

import psutil
import torch

from benchmarks.figures import processor_seconds
from benchmarks.swarm import LocalSwarm, local_swarm, until, watching
from node.data import open_corpus
from node.model import build_uncut
from node.presets import build_manifest
from node.trainer import learning_rate
from protocol.identity import PeerId
from protocol.manifest import BatchSection, Manifest, Schedule, WireCodec
from protocol.reports import Metrics

_MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_DAEMON = "/p2pd"
_START_WITHIN = 120.0
_SECONDS_PER_ROUND = 120.0
_LAST_ROUNDS = 5
"""The final loss is the mean over so many last rounds: one round's 64 sequences are few."""


def speed_manifest(
    *, wire: WireCodec, rounds: int, microbatches: int, schedule: Schedule = "overlapped"
) -> Manifest:
    """Six layers of width 512 in three even stages, context 256, on bytes."""
    manifest = _manifest(None, _MODEL, wire, rounds, schedule)
    batch = BatchSection(context=256, sequences=4, microbatches=microbatches)
    return manifest.model_copy(update={"batch": batch})


def tiny_manifest(schedule: Schedule, rounds: int | None = None, replicas: int = 1) -> Manifest:
    return _manifest("tiny", None, "fp32", rounds, schedule, replicas)


def _manifest(
    preset: str | None,
    config: dict[str, Any] | None,
    wire: WireCodec,
    rounds: int | None,
    schedule: Schedule,
    replicas: int = 1,
) -> Manifest:
    return build_manifest(
        preset=preset,
        config=config,
        stages=3,
        data="builtin:pydoc",
        tokenizer="bytes",
        seed=1,
        testbed=False,
        schedule=schedule,
        rounds=rounds,
        min_replicas=replicas,
        wire=wire,
        name="benchmark",
    )


# --- the swarm ---


@dataclass(frozen=True)
class SwarmSpeed:
    """`tokens_per_second` between the ends of the first and of the last round but one; `loss`: the last rounds' mean.

    `cpu`: processors kept busy in the same interval, by part of the swarm and by others.
    """

    tokens_per_second: float
    loss: float
    lost: int
    cpu: dict[str, float]

    @property
    def tokens_per_processor_second(self) -> float:
        """What the swarm would train if it had one processor to itself."""
        return self.tokens_per_second / sum(share for name, share in self.cpu.items() if name != "others")


@dataclass
class _Stopwatch:
    """Watches the heads: microbatches that are through, forward and back, at the end of which round."""

    heads: int
    last: int
    counts: dict[PeerId, int] = field(default_factory=dict)
    versions: dict[PeerId, int] = field(default_factory=dict)
    lost: dict[PeerId, int] = field(default_factory=dict)
    marks: list[tuple[float, int]] = field(default_factory=list)
    is_running: bool = False

    def hear(self, peer: PeerId, metrics: Metrics) -> None:
        self.versions[peer], self.lost[peer] = metrics.version, metrics.lost
        if metrics.stage != 0:
            return
        self.counts[peer] = metrics.microbatches
        versions = [self.versions[head] for head in self.counts]
        self.is_running = len(versions) == self.heads and min(versions) >= 1 and max(versions) < self.last
        if self.is_running:
            self.marks.append((monotonic(), sum(self.counts.values())))

    def microbatches_per_second(self) -> float:
        (began, first), (ended, last) = self.marks[0], self.marks[-1]
        return (last - first) / (ended - began)


@dataclass
class _Processors:
    """Who uses the machine's processors between two calls of `shares`."""

    pids: dict[str, int]
    _before: dict[str, float] = field(default_factory=dict)
    _at: float = 0.0

    def shares(self) -> dict[str, float]:
        """Processors kept busy since the last call, by part; `others`: by everybody else on the machine."""
        machine, now = psutil.cpu_times(), monotonic()
        used = processor_seconds(self.pids) | {"others": sum(machine) - machine.idle - machine.iowait}
        elapsed, before = now - self._at, self._before
        self._before, self._at = used, now
        shares = {name: (used[name] - before.get(name, 0.0)) / elapsed for name in used}
        shares["others"] -= sum(share for name, share in shares.items() if name != "others")
        grouped: dict[str, float] = {}
        for name, share in shares.items():
            group = "p2pd" if name.endswith(_DAEMON) else name
            grouped[group] = grouped.get(group, 0.0) + share
        return grouped


def _pids(swarm: LocalSwarm) -> dict[str, int]:
    """Every process of the swarm, its daemons under names that end in `_DAEMON`."""
    found = {}
    for node in swarm.processes:
        if node.process.pid is not None:
            found[node.name] = node.process.pid
            for child in psutil.Process(node.process.pid).children():
                found[node.name + _DAEMON] = child.pid
    return found


async def swarm_speed(
    manifest: Manifest, folder: Path, *, replicas: int = 1, threads: int = 1, link_delay: float = 0.0
) -> SwarmSpeed:
    """Run `manifest` to its end, every peer a process of its own."""
    rounds, stages = manifest.schedule.rounds, manifest.stages.count
    async with (
        local_swarm(manifest, folder, threads=threads, link_delay=link_delay) as swarm,
        watching(swarm) as observer,
    ):
        watch = _Stopwatch(replicas, rounds - 1)
        observer.on_metrics = watch.hear
        for _ in range(replicas):
            for stage in range(stages):
                swarm.join(stage)
        timeout = _START_WITHIN + rounds * _SECONDS_PER_ROUND
        await until(observer, lambda: watch.is_running, timeout=timeout, what="the first round")
        processors = _Processors(_pids(swarm))
        processors.shares()
        await until(observer, lambda: not watch.is_running, timeout=timeout, what="the rounds")
        shares = processors.shares()

        def is_over() -> bool:
            done = [version >= rounds for version in watch.versions.values()]
            return all(done) and observer.round_loss(rounds - 1) is not None

        await until(observer, is_over, timeout=timeout, what="the last round")
        losses = [observer.round_loss(round_) for round_ in range(max(0, rounds - _LAST_ROUNDS), rounds)]
    known = [loss for loss in losses if loss is not None]
    tokens = manifest.batch.sequences * manifest.batch.context
    return SwarmSpeed(
        watch.microbatches_per_second() * tokens,
        sum(known) / len(known),
        sum(watch.lost.values()),
        shares,
    )


# --- one process ---


@dataclass(frozen=True)
class UncutSpeed:
    """`cpu`: processors kept busy."""

    tokens_per_second: float
    cpu: float

    @property
    def tokens_per_processor_second(self) -> float:
        return self.tokens_per_second / self.cpu


def uncut_speed(manifest: Manifest, threads: int, rounds: int) -> UncutSpeed:
    """Of the uncut model in a process of its own, without its start and its first microbatch."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_train_uncut, manifest, threads, rounds).result()


def _train_uncut(manifest: Manifest, threads: int, rounds: int) -> UncutSpeed:
    """As anyone would write it: one optimizer over the model's parameters, torch's defaults."""
    torch.set_num_threads(threads)
    corpus, model = open_corpus(manifest), build_uncut(manifest, torch.device("cpu"))
    section, batch = manifest.optimizer, manifest.batch
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(section.beta1, section.beta2), weight_decay=section.weight_decay
    )

    def train(slot: int) -> None:
        samples = corpus.draw(slot)
        loss = model.loss(samples[:, :-1], samples[:, 1:])
        (loss / batch.microbatches).backward()  # type: ignore[no-untyped-call]
        loss.item()

    train(0)
    began, used = perf_counter(), process_time()
    for round_ in range(rounds):
        optimizer.zero_grad()
        for slot in range(round_ * batch.microbatches, (round_ + 1) * batch.microbatches):
            train(slot)
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(section, manifest.schedule.rounds, round_)
        optimizer.step()
    elapsed = perf_counter() - began
    tokens = rounds * batch.microbatches * batch.sequences * batch.context
    return UncutSpeed(tokens / elapsed, (process_time() - used) / elapsed)
