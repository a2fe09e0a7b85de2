"""Experiments: their plans, going on after an interruption, tables and plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiment import Result, run_cases
from benchmarks.experiment_plan import NO_ATTACK, PLANS, Case, plan
from benchmarks.experiment_plots import write_plots
from benchmarks.experiment_tables import build_tables, write_tables
from benchmarks.mesh_config import MeshConfig
from verifier.registry import make_detector
from verifier.saboteur import parse_attack

TINY = MeshConfig(
    replicas=3, stages=3, rounds=2, warmup=0, width=16, context=8, microbatch=1, detector="none"
)


@pytest.mark.parametrize("name", list(PLANS))
def test_every_case_of_a_plan_can_be_run(name: str) -> None:
    for case in plan(name, quick=False) + plan(name, quick=True):
        make_detector(case.config.detector)
        if case.config.attack:
            parse_attack(case.config.attack)


def test_the_paper_is_128_workers_with_200_attacked_rounds_and_enough_seeds() -> None:
    cases = plan("paper", quick=False)
    assert all(case.config.workers == 128 for case in cases)
    assert all(case.config.rounds - case.config.warmup >= 200 for case in cases)
    quiet = [case for case in cases if case.row == NO_ATTACK and case.config.detector == "sentinel"]
    assert len({case.config.seed for case in quiet}) == 20


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    cases = [Case(NO_ATTACK, TINY), Case("zeros", replace(TINY, attack="zeros", fraction=0.34))]
    lines: list[str] = []
    first = run_cases(cases[:1], tmp_path, 1, lines.append)
    assert len(lines) == 1 and "left" in lines[0]
    both = run_cases(cases, tmp_path, 1, lines.append)
    assert len(lines) == 2
    assert both[0].summary == first[0].summary
    run_cases(cases, tmp_path, 1, lines.append)
    assert len(lines) == 2


@pytest.mark.parametrize("name", list(PLANS))
def test_tables_and_plots_come_from_whatever_is_finished(name: str, tmp_path: Path) -> None:
    results = [Result(case, _summary(case)) for case in plan(name, quick=False)[::2]]
    write_tables(name, build_tables(name, results), tmp_path)
    assert f"# {name}" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}-1.csv").read_text().count("\n") >= 2
    pytest.importorskip("matplotlib")
    for path in write_plots(name, results, tmp_path):
        assert path.stat().st_size > 1000


def _summary(case: Case) -> dict[str, Any]:
    attacked = case.config.attack is not None
    return {
        "workers": case.config.workers,
        "honest_workers": 100,
        "precision": 1.0 if attacked else None,
        "recall": 0.9 if attacked else None,
        "f1": 0.95 if attacked else None,
        "false_bans": 0,
        "rounds_to_ban_median": 4 if attacked else None,
        "flagged_fraction_honest": 0.002,
        "val_loss": None if case.config.detector == "none" and attacked else 2.5,
        "val_losses": [[25, 3.0], [50, 2.5]],
        "seconds_per_round": 1.0,
        "verify_seconds_per_round": 0.1,
        "cpu_seconds_per_round": 1.0,
        "verify_cpu_seconds_per_round": 0.1,
    }
