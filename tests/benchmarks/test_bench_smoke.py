"""The benchmarks run and report what they promise; how fast they find us is not a test's business."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gossip
from benchmarks.figures import Ratio, Series
from benchmarks.transport import OwnPath, Trip, Worker, own_worker


def _bench(tmp_path: Path, *arguments: str, timeout: float, module: str = "benchmarks") -> dict[str, Any]:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", module, "--json", str(out), "--repeat", "1", *arguments]
    subprocess.run(command, check=True, timeout=timeout, capture_output=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_ratio_is_taken_repetition_by_repetition() -> None:
    ratio = Ratio.of("r", Series("a", "s", [2.0, 30.0, 9.0]), Series("b", "s", [1.0, 10.0, 9.0]), goal=1.5)
    assert ratio.values == (2.0, 3.0, 1.0)
    assert ratio.median == 2.0
    assert ratio.is_met


def test_ceiling_is_met_from_below() -> None:
    assert Ratio("gap", (0.04, 0.01), 0.05, at_most=True).is_met
    assert not Ratio("gap", (0.2,), 0.05, at_most=True).is_met
    assert Ratio("gap", (0.2,)).is_met is None


@pytest.mark.parametrize("trip", [pytest.param("forward", marks=pytest.mark.slow), "both"])
async def test_tensor_goes_through_a_stage_in_another_process(tmp_path: Path, trip: Trip) -> None:
    with Worker(own_worker, tmp_path) as worker:
        await asyncio.to_thread(worker.wait_ready)
        async with OwnPath(worker, tmp_path, trip, "bf16") as path:
            assert await path.trips(window=2, count=4) > 0


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_ban_spreads_in_a_small_crowd_of_which_one_restarts(tmp_path: Path) -> None:
    found = _bench(tmp_path, "--peers", "6", module="benchmarks.gossip", timeout=160)
    figures = {one["name"]: one["values"] for one in found["figures"]}
    assert figures["restarting: peers"] == [1]
    assert figures["restarting: missed the ban"] == [0]
    # The delay is really there: nobody found a way around the detours.
    assert figures["round trip of a heartbeat, least of all links"][0] >= 2e3 * gossip.DELAY
    assert figures["deciding vote to enforcement, last peer"][0] >= 1e3 * gossip.DELAY


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_transport_measures_all_three_ways(tmp_path: Path) -> None:
    found = _bench(tmp_path, "--only", "transport", "--trips", "2", timeout=880)
    figures = {one["name"]: one["median"] for one in found["parts"]["transport"]["figures"]}
    for way in ("ours fp32", "ours bf16", "raw stream", "RemoteExpert"):
        for window in (1, 4):
            assert figures[f"{way}, forward, {window} in flight"] > 0
            assert figures[f"{way}, both, {window} in flight"] > 0
    goals = {one["goal"] for one in found["parts"]["transport"]["ratios"]}
    assert goals == {4.0, 0.7, None}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_throughput_compares_swarm_and_uncut(tmp_path: Path) -> None:
    found = _bench(tmp_path, "--only", "throughput", "--microbatches", "2", "--rounds", "5", timeout=880)
    ratios = {one["name"]: one["median"] for one in found["parts"]["throughput"]["ratios"]}
    assert ratios["swarm fp32 over uncut"] > 0
    assert ratios["swarm bf16 over uncut"] > 0
