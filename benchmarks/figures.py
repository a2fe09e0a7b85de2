"""Figures that were measured several times on a machine that also does other things."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Series:
    """One quantity, measured once in each repetition."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.4g} {self.unit} ({min(self.values):.4g} - {max(self.values):.4g})"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "unit": self.unit, "median": self.median, "values": self.values}


@dataclass(frozen=True)
class Ratio:
    """One quantity over another, repetition by repetition: what the machine did meanwhile hits both alike."""

    name: str
    values: tuple[float, ...]
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is a ceiling, not a floor."""

    @classmethod
    def of(cls, name: str, top: Series, bottom: Series, goal: float | None = None) -> Ratio:
        return cls(name, tuple(a / b for a, b in zip(top.values, bottom.values, strict=True)), goal)

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def is_met(self) -> bool | None:
        """None where there is no goal."""
        if self.goal is None:
            return None
        return self.median <= self.goal if self.at_most else self.median >= self.goal

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "median": self.median,
            "values": self.values,
            "goal": self.goal,
            "met": self.is_met,
        }


def console() -> Console:
    """Where it is no terminal, wide enough for every table."""
    found = Console(soft_wrap=True)
    return found if found.is_terminal else Console(width=160, soft_wrap=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(one, 2) for one in psutil.getloadavg()],
    }


def family_seconds() -> dict[str, float]:
    """Processor time of this process and all its descendants so far, in p2pd and in everything else."""
    own = psutil.Process()
    spent = {"python": 0.0, "p2pd": 0.0}
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent["p2pd" if process.name() == "p2pd" else "python"] += times.user + times.system
    return spent


def processor_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    """Processor time that each process has used so far."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in pids.items()}
    return {name: one.user + one.system for name, one in times.items()}


class Report:
    """Every series of one part, and the ratios that have a goal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.series: dict[str, Series] = {}
        self.ratios: list[Ratio] = []

    def add(self, name: str, value: float, unit: str) -> None:
        self.series.setdefault(name, Series(name, unit)).values.append(value)
        print(f"{name}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    def ratio(self, name: str, top: str, bottom: str, goal: float | None = None) -> None:
        self.ratios.append(Ratio.of(name, self.series[top], self.series[bottom], goal))

    def show(self, console: Console) -> None:
        figures = Table(title=self.title, title_justify="left")
        for heading in ("", "median", "lowest", "highest"):
            figures.add_column(heading, justify="left" if not heading else "right")
        for one in self.series.values():
            values = (one.median, min(one.values), max(one.values))
            figures.add_row(
                f"{one.name} [{one.unit}]".replace("[", r"\["), *(f"{value:.4g}" for value in values)
            )
        console.print(figures)
        ratios = Table()
        for heading in ("ratio", "median", "lowest", "highest", "goal", ""):
            ratios.add_column(heading, justify="left" if heading == "ratio" else "right")
        for ratio in self.ratios:
            spread = (ratio.median, min(ratio.values), max(ratio.values))
            verdict = {True: "met", False: "missed", None: ""}[ratio.is_met]
            sign = "<=" if ratio.at_most else ">="
            goal = "" if ratio.goal is None else f"{sign} {ratio.goal:g}"
            ratios.add_row(ratio.name, *(f"{value:.3f}" for value in spread), goal, verdict)
        console.print(ratios)

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": [one.as_json() for one in self.series.values()],
            "ratios": [one.as_json() for one in self.ratios],
        }
