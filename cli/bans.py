"""`sentinel-node bans`: who is banned, by whose votes, for what and until when."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli import files, logs, running
from cli.options import Listen
from protocol.errors import UserError
from protocol.invite import Invite

if TYPE_CHECKING:
    from node.observer import Observer
    from protocol.ban_list import BanList, VoteRow

_WIDTH = 120
"""Columns where there is no terminal: room for whole PeerIDs."""


def bans(
    invite: Annotated[
        str | None,
        typer.Argument(help="The invite that `sentinel-node bootstrap` printed.", metavar="INVITE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the signed votes.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the list there, with the signed votes.", metavar="FILE")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Check a list that was exported, without a network.", metavar="FILE")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="The run's manifest, for --check.", metavar="run.toml")
    ] = None,
    listen: Listen = None,
) -> None:
    """Who is banned: by whose votes, for what, until when. Also where verifiers disagree, or contradict themselves.

    Examples:

        sentinel-node bans sentinel1-...

        sentinel-node bans sentinel1-... --export bans.json

        sentinel-node bans --check bans.json --manifest run.toml
    """
    logs.configure(quiet=True)
    if check is not None:
        if invite is not None or export is not None or manifest is None:
            raise UserError(
                "--check is without a network", "Give --check FILE --manifest run.toml and no invite"
            )
        _print_checked(_check(check, manifest), as_json=as_json)
        return
    if invite is None:
        raise UserError("There is no invite", "Give one, or --check FILE --manifest run.toml")
    if manifest is not None:
        raise UserError("--manifest is for --check", "Leave it out: the invite says which run it is")
    if export is not None:
        files.check_writable(export, "--export")
    found = _fetch(Invite.parse(invite), listen)
    if export is not None:
        files.write_json(export, _plain(found), "--export")
    if as_json:
        _print_json(found)
    else:
        _print_table(found)


def _fetch(invite: Invite, listen: list[str] | None) -> BanList:
    from node.observer import Observer
    from protocol.host import DEFAULT_LISTEN

    with tempfile.TemporaryDirectory(prefix="sentinel-bans-") as folder:
        observer = Observer(invite, Path(folder) / "key", tuple(listen or DEFAULT_LISTEN))
        found = running.run(running.interruptible(_collect(observer)))
    if found is None:
        raise typer.Exit(running.INTERRUPTED)
    return found


async def _collect(observer: Observer) -> BanList:
    from protocol.ban_list import list_bans

    try:
        await observer.start()
        if not await observer.gather_votes():
            raise UserError("Nobody gave us their votes", "Try again, or ask the operator if the seed is up")
        return list_bans(observer.votes, time())
    finally:
        await observer.stop()


def _check(path: Path, manifest: Path) -> BanList:
    """Raises `UserError` for a list that does not hold."""
    from protocol import ban_list
    from protocol.manifest import SignedManifest

    electorate = SignedManifest.read(manifest).electorate
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}", "Check the path given with --check"
        ) from None
    found = ban_list.parse(content, str(path))
    ban_list.check(found, electorate)
    return found


def _plain(found: BanList) -> dict[str, object]:
    import msgspec

    content: dict[str, object] = msgspec.to_builtins(found)
    return content


def _print_json(found: BanList) -> None:
    import json

    print(json.dumps(_plain(found), indent=2))


def _print_checked(found: BanList, *, as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    now = time()
    for ban in found.bans:
        state = "in force" if ban.until > now else "over"
        print(f"{ban.peer}  stage {ban.stage}  {len(ban.votes)} votes  until {_when(ban.until)} ({state})")
    count = len(found.bans)
    print(
        f"{count} {'ban holds' if count == 1 else 'bans hold'}, as of {_when(found.as_of)}: signatures, and "
        f"{found.quorum} of {len(found.verifiers)} verifiers for each"
    )


def _print_table(found: BanList) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    if not found.verifiers:
        console.print("This run has no verifiers: nobody is ever banned.")
        return
    table = Table(box=None)
    for heading in ("stage", "peer", "votes", "until", "for"):
        folds = heading == "for" or (heading == "peer" and console.width < _WIDTH)
        table.add_column(heading, overflow="fold", no_wrap=not folds)
    for ban in found.bans:
        votes = f"{len(ban.votes)} of {len(found.verifiers)}"
        table.add_row(str(ban.stage), ban.peer, votes, _when(ban.until), _grounds(ban.votes))
    console.print(
        table if found.bans else f"Nobody is banned ({found.quorum} votes of {len(found.verifiers)})."
    )
    for dispute in found.disputed:
        said = ", ".join(f"{vote.verifier[-8:]} says {vote.verdict}" for vote in dispute.votes)
        console.print(
            f"not banned: {dispute.peer} is {dispute.verdict}; {said}", highlight=False, soft_wrap=True
        )
    for lie in found.contradictions:
        line = f"verifier {lie.verifier} contradicted itself: its votes do not count"
        console.print(line, highlight=False, soft_wrap=True)


def _grounds(votes: tuple[VoteRow, ...]) -> str:
    """Each ground once."""
    said = dict.fromkeys(f"{vote.cause}: {vote.text}" if vote.text else vote.cause for vote in votes)
    return escape("; ".join(said))


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
