"""The live panel of a volunteer on a terminal."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

if TYPE_CHECKING:
    from node.volunteer import Volunteer

_REFRESH = 0.5


class NodePanel:
    """Shows a volunteer's situation while it serves; off a terminal it only waits."""

    def __init__(self, volunteer: Volunteer, *, enabled: bool) -> None:
        self._volunteer = volunteer
        self._live = Live(console=Console(stderr=True), auto_refresh=False) if enabled else None

    def __enter__(self) -> NodePanel:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    async def watch(self) -> None:
        """Until the volunteer fails; raises its error."""
        waiting = asyncio.ensure_future(self._volunteer.wait())
        try:
            while not waiting.done():
                if self._live is not None:
                    self._live.update(self._render(), refresh=True)
                await asyncio.wait({waiting}, timeout=_REFRESH)
            waiting.result()
        finally:
            waiting.cancel()

    def _render(self) -> Panel:
        now = self._volunteer.snapshot()
        metrics, manifest = now.metrics, self._volunteer.manifest
        table = Table.grid(padding=(0, 2))
        table.add_row("stage", f"{metrics.stage} of {manifest.stages.count}, {now.replicas} replicas")
        table.add_row("state", _describe(metrics.state.value, metrics.waiting_for))
        table.add_row("round", f"{metrics.version} of {manifest.schedule.rounds}")
        table.add_row("throughput", f"{metrics.tokens_per_second:,.0f} tokens/s")
        table.add_row(
            "microbatches",
            f"{metrics.microbatches} done, {metrics.in_flight} in flight, "
            f"{metrics.rerouted} rerouted, {metrics.lost} lost",
        )
        if now.loss is not None:
            table.add_row("loss", f"{now.loss:.4f} nats a token")
        table.add_row("holding", f"{now.holding / 2**20:.1f} MiB for reroutes and checks")
        refused = ", ".join(f"{reason} {count}" for reason, count in sorted(metrics.refused.items()))
        table.add_row("refused", refused or "nothing")
        return Panel(table, title=f"{manifest.name} · {self._volunteer.peer_id}", expand=False)


def _describe(state: str, waiting_for: int) -> str:
    return f"waiting: no replica of stage {waiting_for} is there" if waiting_for >= 0 else state
