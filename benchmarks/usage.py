"""CPU time of processes of a swarm, read from outside: of each and of its children, p2pd above all."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

import psutil

from benchmarks.swarm import Process

_EVERY = 1.0
"""Seconds between two readings. They are taken on the cores that they measure."""


class Meter:
    """CPU seconds, user and system, of each process since `start`.

    `read` now and then, as often as you like: what a process used is lost when it is gone.
    """

    def __init__(self) -> None:
        self._families: dict[str, list[psutil.Process]] = {}
        self._from: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._read_at = 0.0

    def start(self, processes: Iterable[Process]) -> None:
        """Once they all have their children: to look for those again, all of the machine's would have to be read."""
        self._families = {process.name: _family(process) for process in processes}
        self._from = {name: sum(map(_seconds, family)) for name, family in self._families.items()}
        self._latest = dict(self._from)

    def read(self, *, every: float = _EVERY) -> None:
        """Unless the last reading is less than `every` seconds old."""
        if monotonic() - self._read_at < every:
            return
        self._read_at = monotonic()
        for name, family in self._families.items():
            self._latest[name] = max(self._latest[name], sum(map(_seconds, family)))

    def used(self, processes: Iterable[Process]) -> float:
        names = [process.name for process in processes]
        return sum(self._latest.get(name, 0.0) - self._from.get(name, 0.0) for name in names)


def _family(process: Process) -> list[psutil.Process]:
    try:
        top = psutil.Process(process.process.pid)
        return [top, *top.children(recursive=True)]
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return []


def _seconds(process: psutil.Process) -> float:
    """0 for one that is gone."""
    try:
        times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0
    return float(times.user + times.system)
