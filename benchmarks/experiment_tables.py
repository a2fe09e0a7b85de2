"""From finished runs to tables: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.experiment import Result
from benchmarks.experiment_plan import NO_ATTACK
from benchmarks.mesh_config import MeshConfig
from verifier.sentinel import Settings

# Harm below this is not worth an attacker's while: it is the size of what another seed changes.
HARMFUL = 0.02
RUINED = "ruined"


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


def write_tables(name: str, tables: Iterable[Table], out: Path) -> None:
    """`out`/NAME.md with all tables, and one CSV for each."""
    parts = [f"# {name}\n"]
    for number, table in enumerate(tables, 1):
        with (out / f"{name}-{number}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table.columns)
            writer.writerows(table.rows)
        parts.append(_markdown(table))
    (out / f"{name}.md").write_text("\n".join(parts))


def _markdown(table: Table) -> str:
    lines = [f"## {table.title}\n", _row(table.columns), _row(["---"] * len(table.columns))]
    lines += [_row(_show(value) for value in row) for row in table.rows]
    return "\n".join([*lines, f"\n{table.note}\n" if table.note else ""])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _show(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def build_tables(name: str, results: list[Result]) -> list[Table]:
    if name == "scale":
        return [_scale_table(results)]
    if name == "ablation":
        return [_ablation_table(results)]
    tables = [_detection_table(results, detector) for detector in detectors_of(results)]
    return [*tables, _false_ban_table(results)] if name == "paper" else tables


def detectors_of(results: list[Result]) -> list[str]:
    """Those that judge, in the order of the plan."""
    named = dict.fromkeys(result.case.config.detector for result in results)
    return [detector for detector in named if detector != "none"]


def attack_free_loss(results: list[Result], config: MeshConfig) -> float | None:
    """Loss of the run of the same size and seed that nobody attacked and nobody judged."""
    for result in results:
        other = result.case.config
        same = (other.replicas, other.stages, other.rounds, other.seed) == (
            config.replicas,
            config.stages,
            config.rounds,
            config.seed,
        )
        if same and other.attack is None and other.detector == "none":
            return _loss(result)
    return None


def _loss(result: Result) -> float | None:
    loss: float | None = result.summary["val_loss"]
    return loss


def harm(results: list[Result], result: Result) -> float | None:
    """Nats of validation loss that this run lost against its attack-free one; None if either is not known."""
    return _lost(result, attack_free_loss(results, result.case.config))


def _lost(result: Result, free: float | None) -> float | None:
    loss = _loss(result)
    return None if free is None or loss is None else loss - free


def _detection_table(results: list[Result], detector: str) -> Table:
    rows = []
    attacked = [one for one in results if one.case.row != NO_ATTACK]
    for row in dict.fromkeys(one.case.row for one in attacked):
        mine = [one for one in attacked if one.case.row == row and one.case.config.detector == detector]
        bare = [one for one in attacked if one.case.row == row and one.case.config.detector == "none"]
        if mine:
            rows.append(_detection_row(results, row, mine, bare))
    macro = [row[4] for row in rows if row[4] is not None]
    harmful = [row[4] for row in rows if row[7] == RUINED or (row[7] is not None and row[7] > HARMFUL)]
    note = f"Macro F1 {mean(macro):.4f}. " if macro else ""
    note += f"Lowest F1 where the attack, undefended, costs over {HARMFUL} nats or ruins the run: "
    note += f"{min(harmful):.3f}." if harmful else "none of those measured."
    columns = (
        "attack",
        "held out",
        "precision",
        "recall",
        "F1",
        "rounds to ban",
        "harm",
        "harm undefended",
        "false bans",
    )
    return Table(f"Detection by {detector}", columns, tuple(rows), note)


def _detection_row(
    results: list[Result], row: str, mine: list[Result], bare: list[Result]
) -> tuple[Any, ...]:
    return (
        row,
        "yes" if mine[0].case.held_out else "",
        _mean(one.summary["precision"] for one in mine),
        _mean(one.summary["recall"] for one in mine),
        _mean(one.summary["f1"] for one in mine),
        median_known(one.summary["rounds_to_ban_median"] for one in mine),
        _mean(harm(results, one) for one in mine),
        _undefended(results, bare),
        sum(one.summary["false_bans"] for one in mine),
    )


def _undefended(results: list[Result], bare: list[Result]) -> float | str | None:
    """The harm of the undefended runs; None if there are none yet."""
    if any(_loss(one) is None for one in bare):
        return RUINED
    return _mean(harm(results, one) for one in bare)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def median_known(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None


def _false_ban_table(results: list[Result]) -> Table:
    alpha = Settings().alpha
    rows = []
    for detector in detectors_of(results):
        mine = [one for one in results if one.case.row == NO_ATTACK and one.case.config.detector == detector]
        honest = sum(one.summary["honest_workers"] for one in mine)
        false_bans = sum(one.summary["false_bans"] for one in mine)
        flagged = _mean(one.summary["flagged_fraction_honest"] for one in mine)
        allowed = alpha * honest if detector == "sentinel" else None
        rows.append((detector, len(mine), honest, false_bans, allowed, flagged))
    columns = (
        "detector",
        "seeds",
        "honest workers",
        "false bans",
        f"allowed at alpha {alpha:g}",
        "refused share",
    )
    return Table("No attack: false bans", columns, tuple(rows))


def _ablation_table(results: list[Result]) -> Table:
    attacked = [one for one in results if one.case.config.attack]
    attacks = list(dict.fromkeys(_attack_of(one) for one in attacked))
    rows = []
    for what in dict.fromkeys(one.case.row for one in results):
        mine = [one for one in attacked if one.case.row == what]
        quiet = [one for one in results if one.case.row == what and not one.case.config.attack]
        by_attack = [[one for one in mine if _attack_of(one) == attack] for attack in attacks]
        harms = [_mean(_harm_beside(quiet, one) for one in some) for some in by_attack]
        rows.append(
            (
                what,
                *(_mean(one.summary["f1"] for one in some) for some in by_attack),
                _mean(one.summary["f1"] for one in mine),
                median_known(one.summary["rounds_to_ban_median"] for one in mine),
                max((one for one in harms if one is not None), default=None),
                sum(one.summary["false_bans"] for one in mine),
                sum(one.summary["false_bans"] for one in quiet),
            )
        )
    names = [f"{attack}, {direction}" for attack, direction in attacks]
    ends = ("mean F1", "rounds to ban", "most harm", "false bans", "false bans without attack")
    note = "F1 by attack, and the harm of the worst of them beside the variant's own run without an attack; means of "
    note += f"{len({one.case.config.seed for one in results})} seeds. All rows but the first and the last two are "
    note += "without recomputation, which would hide much."
    return Table("Ablation", ("variant", *names, *ends), tuple(rows), note)


def _attack_of(result: Result) -> tuple[str | None, str]:
    return result.case.config.attack, result.case.config.attack_direction


def _harm_beside(quiet: list[Result], result: Result) -> float | None:
    """Nats that this run lost against the one of the same seed among `quiet`; None if either is not known."""
    return _lost(
        result, next((_loss(one) for one in quiet if one.case.config.seed == result.case.config.seed), None)
    )


def _scale_table(results: list[Result]) -> Table:
    rows = []
    for one in results:
        # By the clock: a thread that waits for the next operation takes processor time, and does nothing.
        seconds = one.summary["seconds_per_round"]
        verifying = one.summary["verify_seconds_per_round"]
        per_worker = 1e3 * verifying / one.summary["workers"]
        rows.append((one.summary["workers"], seconds, verifying, round(per_worker, 4), verifying / seconds))
    columns = ("workers", "s per round", "verification s", "verification ms per worker", "share")
    return Table("Scale, width 256, context 64", columns, tuple(rows))
