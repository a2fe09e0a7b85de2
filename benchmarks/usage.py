"""CPU time of processes of a swarm, read from outside: of each and of its children, p2pd above all."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from benchmarks.swarm import Process


def cpu_seconds(process: Process) -> float:
    """User and system time so far, of the process and of the children that live; 0 for one that is gone."""
    try:
        top = psutil.Process(process.process.pid)
        return sum(_seconds(one) for one in (top, *top.children(recursive=True)))
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return 0.0


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0
    return float(times.user + times.system)


class Meter:
    """CPU seconds of each process since `start`. `read` now and then: what a process used is lost when it is gone."""

    def __init__(self) -> None:
        self._from: dict[str, float] = {}
        self._latest: dict[str, float] = {}

    def start(self, processes: Iterable[Process]) -> None:
        self._from = {process.name: cpu_seconds(process) for process in processes}
        self._latest = dict(self._from)

    def read(self, processes: Iterable[Process]) -> None:
        for process in processes:
            now = cpu_seconds(process)
            self._latest[process.name] = max(now, self._latest.get(process.name, 0.0))

    def used(self, processes: Iterable[Process]) -> float:
        names = [process.name for process in processes]
        return sum(self._latest.get(name, 0.0) - self._from.get(name, 0.0) for name in names)
