"""Plots of an experiment as PNG. Needs matplotlib, which is in the `plots` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiment import Result
from benchmarks.experiment_plan import NO_ATTACK, STRENGTHS
from benchmarks.experiment_tables import harm
from protocol.errors import UserError


def write_plots(name: str, results: list[Result], out: Path) -> list[Path]:
    """The PNGs of an experiment, named after it."""
    figures = {
        "paper": {"losses": _losses, "detection": _detection},
        "beyond": {"detection-against-harm": _detection_against_harm},
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
    rows = list(dict.fromkeys(one.case.row for one in results if one.case.row != NO_ATTACK))
    for offset, detector in enumerate(("sentinel", "marginal")):
        f1 = {
            one.case.row: one.summary["f1"] or 0.0
            for one in results
            if one.case.config.detector == detector and one.case.config.seed == 0
        }
        places = [index + 0.4 * offset for index in range(len(rows))]
        axes.barh(places, [f1.get(row, 0.0) for row in rows], height=0.4, label=detector)
    axes.set_yticks(range(len(rows)), rows, fontsize=5)
    axes.set(xlabel="F1, by worker")
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
