"""Runs an experiment's cases, several at once, and remembers each: interrupted, it goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from benchmarks.experiment_plan import Case, by_worth
from benchmarks.mesh import run_mesh
from benchmarks.mesh_report import summarise

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """A finished case with its summary (see `benchmarks.mesh_report`)."""

    case: Case
    summary: dict[str, Any]


def run_cases(cases: list[Case], out: Path, jobs: int, say: Say) -> list[Result]:
    """Run what is not yet in `out`/runs, one line per finished run; all results, in the order of the cases.

    Interrupted (Ctrl-C), the results so far.
    """
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    missing = {_key(case): case for case in sorted(cases, key=by_worth) if not _file(runs, case).is_file()}
    if missing:
        _run_missing(list(missing.values()), runs, jobs, say)
    finished = [(case, _file(runs, case)) for case in cases]
    return [Result(case, json.loads(file.read_text())) for case, file in finished if file.is_file()]


def _run_missing(cases: list[Case], runs: Path, jobs: int, say: Say) -> None:
    begun = time.monotonic()
    finished = _one_by_one(cases) if jobs == 1 else _side_by_side(cases, jobs)
    try:
        for done, (case, summary) in enumerate(finished, 1):
            _write(_file(runs, case), json.dumps(summary))
            left = (time.monotonic() - begun) / done * (len(cases) - done)
            say(f"{done}/{len(cases)}  {_line(case, summary)}  {left / 60:.0f} min left")
    except KeyboardInterrupt:
        say("interrupted: tables of what is finished; start again to go on")


def _one_by_one(cases: list[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """With as many threads as `simulate` would use."""
    available = torch.get_num_threads()
    for case in cases:
        torch.set_num_threads(min(available, case.config.useful_threads))
        yield case, _run_case(case)


def _side_by_side(cases: list[Case], jobs: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """In processes of one thread each: small tensors gain nothing from threads. Spawned, since torch cannot fork."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_use_one_thread) as pool:
        futures = {pool.submit(_run_case, case): case for case in cases}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _run_case(case: Case) -> dict[str, Any]:
    return summarise(run_mesh(case.config))


def _key(case: Case) -> str:
    """A case is known by its configuration alone, so that tables may share runs."""
    return blake3(json.dumps(case.config.to_dict(), sort_keys=True).encode()).hexdigest()[:24]


def _file(runs: Path, case: Case) -> Path:
    return runs / f"{_key(case)}.json"


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def _line(case: Case, summary: dict[str, Any]) -> str:
    f1, loss = summary["f1"], summary["val_loss"]
    found = "no bans" if f1 is None else f"F1 {f1:.3f}"
    learnt = "ruined" if loss is None else f"loss {loss:.3f}"
    seed = case.config.seed
    return f"{case.row:34s} {case.config.detector:24s} seed {seed}  {found}  {learnt}  false {summary['false_bans']}"


def default_jobs() -> int:
    return max(1, os.cpu_count() or 1)
