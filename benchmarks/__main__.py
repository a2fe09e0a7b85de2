"""`python -m benchmarks`: how fast it is, measured side by side in one run. docs/performance.md explains it."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

# hivemind reads it when it is imported, here and in the processes that we start.
os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")

import torch

from benchmarks import gossip, swarm
from benchmarks.figures import Ratio, Report, console, family_seconds, machine
from benchmarks.throughput import speed_manifest, swarm_speed, tiny_manifest, uncut_speed
from benchmarks.transport import (
    TENSOR_BYTES,
    OwnPath,
    RawPath,
    Trip,
    Worker,
    expert_worker,
    own_worker,
    raw_worker,
)
from protocol.manifest import Schedule, WireCodec

PARTS = ("transport", "throughput", "delay", "gossip")
WINDOWS = (1, 4)
_THREADS = (1, 2)
_WARM_UP = 32
"""Trips before the clock runs, each way alike: until ours holds all the evidence it may, and touches no new memory."""

SCHEDULES: tuple[Schedule, ...] = ("synchronous", "overlapped")
CODECS: tuple[WireCodec, ...] = ("fp32", "bf16")
TRIPS: tuple[Trip, ...] = ("forward", "both")

_console = console()


async def transport(folder: Path, repeat: int, trips: int) -> Report:
    """(a) A tensor to a stage in another process and back. All stay up, and take turns."""
    report = Report(f"(a) A {TENSOR_BYTES / 1e6:.1f} MB tensor to a stage and back, time a trip")
    async with AsyncExitStack() as stack:
        own = stack.enter_context(Worker(own_worker, folder))
        echo = stack.enter_context(Worker(raw_worker, folder))
        expert = stack.enter_context(Worker(expert_worker))
        for worker in (own, expert):
            await asyncio.to_thread(worker.wait_ready)
        raw = await stack.enter_async_context(RawPath(folder, *await asyncio.to_thread(echo.wait_ready)))
        paths = {
            (trip, codec): await stack.enter_async_context(OwnPath(own, folder, trip, codec))
            for trip in TRIPS
            for codec in CODECS
        }
        await raw.trips(max(WINDOWS), _WARM_UP)
        for path in paths.values():
            await path.trips(max(WINDOWS), _WARM_UP)
        for trip in TRIPS:
            await asyncio.to_thread(expert.ask, trip, max(WINDOWS), _WARM_UP)

        async def measure(name: str, run: Callable[[], Awaitable[float]], count: int, times: int) -> None:
            before = family_seconds()
            seconds = await run()
            after = family_seconds()
            report.add(name, times * seconds * 1e3, "ms")
            for part in after:
                spent = times * (after[part] - before[part]) / count
                report.add(f"{name}: processor time in {part}", spent * 1e3, "ms")
            total = times * (sum(after.values()) - sum(before.values())) / count
            report.add(f"{name}: processor time", total * 1e3, "ms")

        for _ in range(repeat):
            for window, trip in itertools.product(WINDOWS, TRIPS):
                case = f"{trip}, {window} in flight"
                # Forward and backward takes the tensor there and back twice.
                times = 2 if trip == "both" else 1
                await measure(f"raw stream, {case}", partial(raw.trips, window, trips), trips, times)
                for codec in CODECS:
                    run = partial(paths[trip, codec].trips, window, trips)
                    await measure(f"ours {codec}, {case}", run, trips, 1)
                few = max(1, trips // 2)
                run = partial(asyncio.to_thread, expert.ask, trip, window, few)
                # It warms up with as many calls as go at once.
                await measure(f"RemoteExpert, {case}", run, few + window, 1)
    for window, trip, codec in itertools.product(WINDOWS, TRIPS, CODECS):
        case, has_goal = f"{trip}, {window} in flight", codec == "fp32"
        ours = f"ours {codec}, {case}"
        for other, goal in (("RemoteExpert", 4.0), ("raw stream", 0.7)):
            theirs = f"{other}, {case}"
            report.ratio(f"{other} / {ours}", theirs, ours, goal if has_goal else None)
            report.ratio(
                f"{other} / {ours}: processor time", f"{theirs}: processor time", f"{ours}: processor time"
            )
    return report


async def throughput(folder: Path, repeat: int, rounds: int, microbatches: int) -> Report:
    """(b) and (c): tokens per second of three stages of one model, and of the model uncut in one process."""
    report = Report(
        "(b), (c) 6 layers of width 512, context 256, in 3 stages and uncut, on the same processors"
    )
    for turn in range(repeat):
        for threads in _THREADS:
            manifest = speed_manifest(wire="fp32", rounds=rounds, microbatches=microbatches)
            uncut = await asyncio.to_thread(uncut_speed, manifest, threads, 1)
            report.add(f"uncut, {threads} threads", uncut.tokens_per_second, "tokens/s")
            report.add(f"uncut, {threads} threads, processors busy", uncut.cpu, "")
            report.add(
                f"uncut, {threads} threads, rate a processor", uncut.tokens_per_processor_second, "tokens/s"
            )
        for codec in CODECS:
            manifest = speed_manifest(wire=codec, rounds=rounds, microbatches=microbatches)
            swarm = await swarm_speed(manifest, folder / f"{codec}{turn}")
            report.add(f"swarm {codec}", swarm.tokens_per_second, "tokens/s")
            report.add(f"swarm {codec}, rate a processor", swarm.tokens_per_processor_second, "tokens/s")
            for part, share in swarm.cpu.items():
                report.add(f"swarm {codec}, processors busy: {part}", share, "")
    best = max(_THREADS, key=lambda threads: report.series[f"uncut, {threads} threads"].median)
    for codec in CODECS:
        report.ratio(f"swarm {codec} over uncut", f"swarm {codec}", f"uncut, {best} threads", 0.85)
        report.ratio(
            f"swarm {codec} over uncut, a processor's worth",
            f"swarm {codec}, rate a processor",
            f"uncut, {best} threads, rate a processor",
        )
    return report


async def delay(folder: Path, repeat: int, rounds: int | None) -> Report:
    """The two schedules over links of 100 ms: the preset `tiny`, two replicas a stage as in the demo."""
    report = Report("Preset tiny, 3 stages x 2 replicas, 100 ms added to all that is sent")
    for turn in range(repeat):
        for schedule in SCHEDULES:
            manifest = tiny_manifest(schedule, rounds, replicas=2)
            place = folder / f"{schedule}{turn}"
            swarm = await swarm_speed(manifest, place, replicas=2, link_delay=0.1)
            report.add(f"{schedule}", swarm.tokens_per_second, "tokens/s")
            report.add(f"{schedule}, final loss", swarm.loss, "nats/token")
            report.add(f"{schedule}, lost microbatches", swarm.lost, "")
            busy = sum(share for part, share in swarm.cpu.items() if part != "others")
            report.add(f"{schedule}, processors busy", busy, "")
    report.ratio("overlapped over synchronous", "overlapped", "synchronous", 2.0)
    losses = [report.series[f"{schedule}, final loss"].values for schedule in ("overlapped", "synchronous")]
    gaps = tuple(late - exact for late, exact in zip(*losses, strict=True))
    report.ratios.append(Ratio("loss: overlapped minus synchronous", gaps, 0.05, at_most=True))
    return report


async def _measure(options: argparse.Namespace) -> None:
    results: dict[str, Any] = {"machine": machine(), "parts": {}}
    for part in options.only or PARTS:
        with tempfile.TemporaryDirectory(prefix="sentinel-bench-") as name:
            folder = Path(name)
            if part == "transport":
                report = await transport(folder, options.repeat or 10, options.trips)
            elif part == "throughput":
                report = await throughput(
                    folder, options.repeat or 3, options.rounds or 4, options.microbatches
                )
            elif part == "gossip":
                report = await gossip.spread(folder, options.repeat or 5)
            else:
                report = await delay(folder, options.repeat or 1, options.rounds)
        load = machine()["load_average"]
        _console.print(f"load average at its end: {load}")
        report.show(_console)
        results["parts"][part] = {**report.as_json(), "load_average_after": load}
        if options.json is not None:
            text = json.dumps(results, indent=1) + "\n"
            await asyncio.to_thread(options.json.write_text, text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="repetitions (10 of transport, 5 of gossip, 3, 1 of delay)"
    )
    parser.add_argument(
        "--trips", type=int, default=16, metavar="N", help="trips of a tensor in a repetition"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of a swarm (4; delay: the preset's)")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N", help="a round's (throughput)")
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    gossip.silence()
    _console.print(machine())
    try:
        swarm.run(_measure(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


if __name__ == "__main__":
    main()
