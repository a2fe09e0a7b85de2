"""`python -m benchmarks.live`: attackers in a live swarm, the whole table, and what verification costs.

Each row is the demo's main job on this machine: 3 stages x 3 replicas, 3 verifiers with a quorum of 2, the tiny model.
Every seed has several runs without an attacker, with verifiers and without in turns: equal runs differ by several per
cent in speed and several hundredths of a nat in loss. A run before them all is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

# hivemind reads it when it is imported, here and in the processes that we start.
os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")

from rich.table import Table

from benchmarks import swarm
from benchmarks.demo import Threat, run_demo
from benchmarks.figures import console, machine
from benchmarks.throughput import speed_manifest
from node.presets import build_manifest
from protocol.manifest import Manifest

ATTACKS = ("zeros", "flip", "random", "delay:20", "random-sign:0.3")
DIRECTIONS = ("activation", "gradient")
STAGES, REPLICAS = 3, 3
GUARDED = Threat(verifiers=3, quorum=2)
WARM_UP = "warm-up"
"""A run with all processes that is not counted: a machine is slow to give memory that it has not given lately, and the
first run would pay for all."""
LOSS_GOAL, COST_GOAL, THROUGHPUT_GOAL, FLAGGED_GOAL = 0.05, 0.05, 0.95, 0.005

_console = console()


@dataclass(frozen=True)
class Row:
    """One run: what was asked for, and the demo's result."""

    seed: int
    kind: str
    threat: Threat
    result: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.result.items() if key not in ("peers", "losses")}
        attack = f"{self.threat.attack} {self.threat.direction}" if self.threat.malicious else None
        return {"seed": self.seed, "kind": self.kind, "attack": attack, **kept}


def tiny(seed: int, rounds: int) -> Manifest:
    return build_manifest(
        preset="tiny", config=None, stages=STAGES, data="builtin:pydoc", tokenizer="bytes", seed=seed, testbed=True,
        schedule="overlapped", rounds=rounds, min_replicas=REPLICAS, wire="fp32", name="live",
    )  # fmt: skip


async def run(manifest: Manifest, replicas: int, seed: int, kind: str, threat: Threat) -> Row:
    with tempfile.TemporaryDirectory(prefix="sentinel-live-") as folder:
        result = await run_demo(manifest, Path(folder), replicas=replicas, threat=threat)
    row = Row(seed, kind, threat, result)
    _console.print(_line(row), highlight=False)
    return row


async def measure_wide(rounds: int, pairs: int) -> list[Row]:
    """Width 512, one replica a stage, since more would wait for the same processors: what verification costs there."""
    manifest = speed_manifest(wire="fp32", rounds=rounds, microbatches=8)
    await run(manifest, 1, 0, WARM_UP, GUARDED)
    return [await run(manifest, 1, 0, kind, threat) for kind, threat in _in_turns(pairs)]


def _in_turns(pairs: int) -> list[tuple[str, Threat]]:
    """Runs without an attacker. Each pair begins with what the last one ended with, which lessens drift."""
    pair = [("verified", GUARDED), ("unverified", Threat())]
    return [one for number in range(pairs) for one in (pair if number % 2 == 0 else pair[::-1])]


def _line(row: Row) -> str:
    bans = ", ".join(f"stage {ban['stage']} after {ban['rounds_to_ban']}" for ban in row.result["bans"])
    what = f"{row.threat.attack} {row.threat.direction}" if row.threat.malicious else row.kind
    return (
        f"seed {row.seed}  {what:28s} loss {row.result['final_loss']:.3f}   banned: {bans or 'nobody'}   "
        f"flagged {row.result['flagged_fraction']:.2%}   {row.result['tokens_per_second']:,.0f} tokens/s"
    )


async def measure(
    seeds: Sequence[int],
    rounds: int,
    pairs: int,
    start: int,
    attacks: Sequence[str],
    directions: Sequence[str],
) -> list[Row]:
    attacked = [
        ("attacked", replace(GUARDED, malicious=1, attack=attack, direction=direction, start=start))
        for attack in attacks
        for direction in directions
    ]
    await run(tiny(seeds[0], rounds), REPLICAS, seeds[0], WARM_UP, GUARDED)
    return [
        await run(tiny(seed, rounds), REPLICAS, seed, kind, threat)
        for seed in seeds
        for kind, threat in (*_in_turns(pairs), *attacked)
    ]


def _without_attacker(rows: Sequence[Row]) -> dict[int, list[float]]:
    """Final losses by seed."""
    losses: dict[int, list[float]] = {}
    for row in rows:
        if not row.threat.malicious:
            losses.setdefault(row.seed, []).append(row.result["final_loss"])
    return losses


def tabulate(rows: Sequence[Row]) -> Table:
    """An attack a row, over its seeds; losses against the mean of the same seed's runs without an attacker."""
    clean = {seed: mean(losses) for seed, losses in _without_attacker(rows).items()}
    table = Table(
        "attack",
        "direction",
        "runs",
        "banned",
        "false bans",
        "rounds to ban",
        "to banned",
        "loss gap, mean",
        "most",
    )
    attacked: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.threat.malicious:
            attacked.setdefault((row.threat.attack, row.threat.direction), []).append(row)
    for (attack, direction), group in attacked.items():
        true = [ban for row in group for ban in row.result["bans"] if ban["true_attacker"]]
        gaps = [row.result["final_loss"] - clean[row.seed] for row in group]
        table.add_row(
            attack,
            direction,
            str(len(group)),
            str(len(true)),
            str(sum(row.result["false_bans"] for row in group)),
            ", ".join(str(ban["rounds_to_ban"]) for ban in true),
            str(sum(row.result["microbatches_to_banned_after_ban"] for row in group)),
            f"{mean(gaps):+.3f}",
            f"{max(gaps, key=abs):+.3f}",
        )
    return table


def costs(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the runs without an attacker; throughput pair by pair."""
    every = [row.result for row in rows if row.kind == "verified"]
    plain = [row.result for row in rows if row.kind == "unverified"]
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(every, plain, strict=True)]
    return {
        "bytes_fraction": median(one["verification"]["bytes_fraction"] for one in every),
        "cpu_fraction": median(one["verification"]["cpu_fraction"] for one in every),
        "sampled_fraction": median(one["verification"]["sampled_fraction"] for one in every),
        "throughput_ratio": median(ratios),
        "throughput_ratios": ratios,
        "flagged_fraction": max(one["flagged_fraction"] for one in every),
        "bans_without_attacker": sum(len(one["bans"]) for one in every),
        "equal_runs_differ_by": max(max(losses) - min(losses) for losses in _without_attacker(rows).values()),
        "goals": {
            "bytes_fraction": COST_GOAL,
            "cpu_fraction": COST_GOAL,
            "throughput_ratio": THROUGHPUT_GOAL,
            "flagged_fraction": FLAGGED_GOAL,
            "loss_gap": LOSS_GOAL,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=6, help="runs of a seed with verifiers and without")
    parser.add_argument("--start", type=int, default=10, help="first round that is attacked")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), metavar="SPEC")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=(*DIRECTIONS, "both"))
    parser.add_argument("--wide", action="store_true", help="only what it costs on a model of width 512")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    work = (
        measure_wide(chosen.rounds, chosen.pairs)
        if chosen.wide
        else measure(
            chosen.seeds, chosen.rounds, chosen.pairs, chosen.start, chosen.attacks, chosen.directions
        )
    )
    try:
        rows = swarm.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
    found = costs(rows)
    if not chosen.wide:
        _console.print(tabulate(rows))
    _console.print_json(json.dumps(found))
    if chosen.json is not None:
        body = {"machine": machine(), "costs": found, "runs": [row.as_json() for row in rows]}
        chosen.json.write_text(json.dumps(body, indent=2))
        print(f"written: {chosen.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
