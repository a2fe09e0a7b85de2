"""`sentinel-node peers`: who serves what."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli import logs, running
from cli.options import InviteText, Listen
from protocol.invite import Invite

if TYPE_CHECKING:
    from node.observer import Observer
    from protocol.directory import StageRecord

_LISTEN_FOR = 2.5
_WIDTH = 120
"""Columns where there is no terminal: room for whole PeerIDs."""


def peers(
    invite: InviteText,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    listen: Listen = None,
) -> None:
    """Who serves what: peer, stage, state, weights version, throughput, load, last seen.

    Examples:

        sentinel-node peers sentinel1-...

        sentinel-node peers sentinel1-... --json
    """
    parsed = Invite.parse(invite)
    from node.observer import Observer
    from protocol.host import DEFAULT_LISTEN

    logs.configure(quiet=True)
    with tempfile.TemporaryDirectory(prefix="sentinel-peers-") as folder:
        observer = Observer(parsed, Path(folder) / "key", tuple(listen or DEFAULT_LISTEN))
        rows = running.run(running.interruptible(_collect(observer)))
    if rows is None:
        raise typer.Exit(running.INTERRUPTED)
    if as_json:
        print(json.dumps({"run": parsed.run.hex(), "peers": rows}, indent=2))
        return
    _print_table(rows)


async def _collect(observer: Observer) -> list[dict[str, Any]]:
    try:
        await observer.start()
        await observer.meet()
        await asyncio.sleep(_LISTEN_FOR)  # Each peer reports once a second.
        return [_row(observer, record) for record in await observer.records()]
    finally:
        await observer.stop()


def _row(observer: Observer, record: StageRecord) -> dict[str, Any]:
    """Fresh figures where the peer was heard; else what its record in the DHT says."""
    from protocol.identity import PeerId

    sighting = observer.sightings.get(PeerId(record.peer))
    metrics = sighting.metrics if sighting else None
    last_seen = observer.seconds_since(sighting) if sighting else max(0.0, time() - record.stated)
    return {
        "peer": record.peer,
        "stage": record.stage,
        "state": (metrics or record).state.value,
        "weights_version": (metrics or record).version,
        "state_digest": (metrics or record).digest.hex(),
        "throughput": round(metrics.tokens_per_second if metrics else record.throughput, 1),
        "load": round(metrics.in_flight / max(1, record.capacity) if metrics else record.load, 3),
        "last_seen": round(last_seen, 1),
        "microbatches": metrics.microbatches if metrics else None,
        "lost": metrics.lost if metrics else None,
        "rerouted": metrics.rerouted if metrics else None,
        "refused": dict(metrics.refused) if metrics else None,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for heading in ("stage", "peer", "state", "version", "tokens/s", "load", "last seen"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "peer")
    for row in sorted(rows, key=lambda row: (row["stage"], row["peer"])):
        table.add_row(
            str(row["stage"]),
            row["peer"],
            row["state"],
            str(row["weights_version"]),
            f"{row['throughput']:,.0f}",
            f"{row['load']:.0%}",
            f"{row['last_seen']:.0f} s ago",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(table if rows else "Nobody serves this run yet.")
