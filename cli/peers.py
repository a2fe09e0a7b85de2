"""`sentinel-node peers`: who serves what, and what the verifiers hold of them."""

from __future__ import annotations

import asyncio
import json
import tempfile
from datetime import datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli import logs, running
from cli.options import InviteText, Listen
from protocol.errors import UserError
from protocol.invite import Invite

if TYPE_CHECKING:
    from node.observer import Observer
    from protocol.directory import StageRecord
    from protocol.identity import PeerId

_LISTEN_FOR = 2.5
_JUDGED_FOR = 5.5
_OF_NODES = (
    "state", "weights_version", "state_digest", "throughput", "load", "last_seen", "microbatches", "lost",
    "rerouted", "refused",
)  # fmt: skip
_WIDTH = 160
"""Columns where there is no terminal: room for whole PeerIDs."""


def peers(
    invite: InviteText,
    peer: Annotated[
        str | None, typer.Option(help="Show one peer's history, and the evidence behind it.", metavar="ID")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    listen: Listen = None,
) -> None:
    """Who serves what, and what the verifiers hold of whom.

    Samples, flags and score are the median over the verifiers. The score is the evidence against a peer, in nats.

    Examples:

        sentinel-node peers sentinel1-...

        sentinel-node peers sentinel1-... --json

        sentinel-node peers sentinel1-... --peer 12D3KooW...
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
    if peer is not None:
        rows = [row for row in rows if row["peer"] == peer]
        if not rows:
            raise UserError(f"Nobody knows a peer {peer}", "Take its id from `sentinel-node peers INVITE`")
    if as_json:
        print(json.dumps({"run": parsed.run.hex(), "peers": rows}, indent=2))
    elif peer is not None:
        _print_history(rows[0])
    else:
        _print_table(rows)


async def _collect(observer: Observer) -> list[dict[str, Any]]:
    try:
        await observer.start()
        await observer.meet()
        await observer.gather_votes()
        await asyncio.sleep(_LISTEN_FOR)  # Each peer reports once a second.
        if observer.signed.manifest.verification.verifiers:
            await asyncio.sleep(_JUDGED_FOR - _LISTEN_FOR)  # Each verifier every five.
        rows = [_row(observer, record) for record in await observer.records()]
        return rows + _gone(observer, {row["peer"] for row in rows})
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
        **_said(observer, PeerId(record.peer)),
    }


def _said(observer: Observer, peer: PeerId) -> dict[str, Any]:
    """What others say of a peer: of the verifiers the quorum's verdict, the median of their figures, their votes and
    words; and of its neighbours who leaves it alone."""
    from protocol.votes import Verdict

    votes, book = observer.votes, observer.reputation
    standing = book.standings(excluded=votes.contradictions).get(peer)
    return {
        "verdict": votes.verdicts().get(peer, Verdict.OK).value,
        "score": round(standing.log_evidence, 2) if standing else None,
        "samples": standing.samples if standing else None,
        "flags": {
            "activation": standing.activation_flags if standing else None,
            "gradient": standing.gradient_flags if standing else None,
        },
        "votes": [
            {
                "verifier": verifier,
                "verdict": one.vote.verdict.value,
                "cause": one.vote.cause.value,
                "text": one.vote.text,
                "evidence": one.vote.evidence.hex(),
                "issued": one.vote.issued,
                "expires": one.vote.expires,
            }
            for verifier, one in sorted(votes.votes_on(peer, time()).items())
        ],
        "history": {
            verifier: list(account.words) for verifier, account in sorted(book.accounts_of(peer).items())
        },
        "shunned_by": observer.shunned_by(peer),
    }


def _gone(observer: Observer, known: set[str]) -> list[dict[str, Any]]:
    """Peers without a record that votes are about: who is banned is not in the directory for long."""
    rows = []
    for peer in sorted(observer.votes.subjects() - known):
        said = _said(observer, peer)
        if said["votes"]:
            stage = next(iter(observer.votes.votes_on(peer, time()).values())).vote.stage
            rows.append({"peer": peer, "stage": stage, **dict.fromkeys(_OF_NODES), "state": "gone", **said})
    return rows


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for heading in (
        "stage", "peer", "state", "version", "tokens/s", "load", "last seen", "verdict", "score", "samples", "flags",
        "votes", "shunned by",
    ):  # fmt: skip
        table.add_column(heading, overflow="fold", no_wrap=heading != "peer")
    for row in sorted(rows, key=lambda row: (row["stage"], row["peer"])):
        is_gone = row["weights_version"] is None
        flags = row["flags"]
        table.add_row(
            str(row["stage"]),
            row["peer"],
            row["state"],
            "" if is_gone else str(row["weights_version"]),
            "" if is_gone else f"{row['throughput']:,.0f}",
            "" if is_gone else f"{row['load']:.0%}",
            "" if is_gone else f"{row['last_seen']:.0f} s ago",
            row["verdict"],
            "" if row["score"] is None else f"{row['score']:z.1f}",
            "" if row["samples"] is None else f"{row['samples']:.0f}",
            "" if row["samples"] is None else f"{flags['activation']:.0f}+{flags['gradient']:.0f}",
            str(len(row["votes"]) or ""),
            str(len(row["shunned_by"]) or ""),
        )
    _console().print(table if rows else "Nobody serves this run yet.")


def _print_history(row: dict[str, Any]) -> None:
    """One peer, in words."""
    console = _console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    say(f"{row['peer']}, stage {row['stage']}, {row['state']}: {row['verdict']}")
    if row["samples"] is None:
        say("No verifier has reported on it lately.")
    else:
        flags = row["flags"]
        say(
            f"{row['samples']:.0f} samples of its work were judged; {flags['activation']:.0f} activations and "
            f"{flags['gradient']:.0f} gradients were odd; the evidence against it is {row['score']:z.1f} nats."
        )
    for sender in row["shunned_by"]:
        say(f"{sender} sends it nothing for a while, since what it sent before did not come back")
    for vote in row["votes"]:
        until = datetime.fromtimestamp(vote["expires"]).strftime("%Y-%m-%d %H:%M")
        say(f"{vote['verifier']} votes {vote['verdict']} ({vote['cause']}) until {until}: {vote['text']}")
        say(f"    evidence {vote['evidence']}")
    for verifier, words in row["history"].items():
        for said in words:
            say(f"{verifier} noted: {said}")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
