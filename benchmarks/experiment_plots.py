"""Plots of an experiment as PNG. Needs matplotlib, which is in the `plots` extra."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.experiment import Result
from benchmarks.experiment_plan import NO_ATTACK, STRENGTHS
from benchmarks.experiment_tables import detectors_of, harm, median_known
from protocol.errors import UserError
from verifier.sentinel import Settings


def write_plots(name: str, results: list[Result], out: Path) -> list[Path]:
    """The PNGs of an experiment, named after it."""
    figures = {
        "paper": {
            "losses": _losses,
            "detection": _detection,
            "rounds-to-ban": _rounds_to_ban,
            "false-bans": _false_bans,
        },
        "beyond": {"detection-against-harm": _detection_against_harm, "rounds-to-ban": _rounds_to_ban},
        "ablation": {},
        "scale": {"scale": _scale},
    }
    plt = _pyplot()
    written = []
    for what, draw in figures[name].items():
        figure, axes = plt.subplots(figsize=(8, 5))
        draw(axes, results)
        path = out / f"{name}-{what}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("Plots need matplotlib", "pip install 'sentinel-node[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _losses(axes: Any, results: list[Result]) -> None:
    """Loss curves of the attack-free run, and of one strong attack under each detector."""
    shown = next((one.case.row for one in results if one.case.row.startswith("zeros")), "")
    for one in results:
        if one.case.config.seed == 0 and one.case.row in (NO_ATTACK, shown):
            rounds, losses = zip(*one.summary["val_losses"], strict=True)
            axes.plot(rounds, losses, label=f"{one.case.row}: {one.case.config.detector}")
    axes.set(xlabel="round", ylabel="validation loss, nats per token")
    axes.legend(fontsize=7)


def _detection(axes: Any, results: list[Result]) -> None:
    """F1 of each attack, a bar a detector; seed 0."""
    _bars(axes, [one for one in results if one.case.config.seed == 0], "f1")
    axes.set(xlabel="F1, by worker")


def _rounds_to_ban(axes: Any, results: list[Result]) -> None:
    """From an attack's start to the median attacker's ban, a bar a detector; the median of the seeds."""
    _bars(axes, results, "rounds_to_ban_median")
    axes.set(xlabel="rounds to ban, median attacker (no bar: none was banned, or earlier than the attack)")


def _bars(axes: Any, results: list[Result], key: str) -> None:
    """Of each attack, a bar for each of at most two detectors: the median of `key` over the runs that have it."""
    attacked = [one for one in results if one.case.row != NO_ATTACK]
    rows = list(dict.fromkeys(one.case.row for one in attacked))
    for offset, detector in enumerate(detectors_of(attacked)):
        mine = [one for one in attacked if one.case.config.detector == detector]
        found = [median_known(one.summary[key] for one in mine if one.case.row == row) for row in rows]
        values = [max(0.0, value or 0.0) for value in found]
        places = [index + 0.4 * offset for index in range(len(rows))]
        axes.barh(places, values, height=0.4, label=detector)
    axes.set_yticks(range(len(rows)), rows, fontsize=5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=2)


def _false_bans(axes: Any, results: list[Result]) -> None:
    """Without an attack: honest workers banned, seed after seed, and how many alpha allows."""
    quiet = [one for one in results if one.case.row == NO_ATTACK]
    alpha, most = Settings().alpha, 0
    for detector in detectors_of(quiet):
        mine = [one.summary for one in quiet if one.case.config.detector == detector]
        workers = [0, *accumulate(one["honest_workers"] for one in mine)]
        axes.plot(workers, [0, *accumulate(one["false_bans"] for one in mine)], marker=".", label=detector)
        most = max(most, workers[-1])
    axes.plot([0, most], [0, alpha * most], linestyle="--", label=f"allowed at alpha {alpha:g}")
    axes.set(xlabel="honest workers watched, a seed a point", ylabel="of them banned")
    axes.legend()


def _detection_against_harm(axes: Any, results: list[Result]) -> None:
    """F1 against the loss that the undefended attack costs, attack strength swept."""
    rows = {f"{attack}, {direction}" for attack, direction in STRENGTHS}
    undefended = {one.case.row: harm(results, one) for one in results if one.case.config.detector == "none"}
    for detector in ("sentinel", "sentinel:no-recompute"):
        mine = [one for one in results if one.case.row in rows and one.case.config.detector == detector]
        points = [(undefended.get(one.case.row), one.summary["f1"] or 0.0, one.case.row) for one in mine]
        known = [(x, y, row) for x, y, row in points if x is not None]
        axes.scatter([x for x, _, _ in known], [y for _, y, _ in known], label=detector)
        for x, y, row in known:
            axes.annotate(row.split(",")[0], (x, y), fontsize=6)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set(xlabel="harm undefended, nats of validation loss", ylabel="F1, by worker")
    axes.legend()


def _scale(axes: Any, results: list[Result]) -> None:
    workers = [one.summary["workers"] for one in results]
    per_worker = [1e3 * one.summary["verify_seconds_per_round"] / one.summary["workers"] for one in results]
    axes.plot(workers, per_worker, marker="o")
    axes.set(xlabel="workers", ylabel="verification, ms per worker and round", ylim=(0, None))
