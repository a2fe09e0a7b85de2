"""`sentinel-node join`: be a volunteer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import logs, running
from cli.options import (
    DEFAULT_HOME,
    AttackDirection,
    AttackSpec,
    AttackStart,
    IdentityFile,
    InviteText,
    Listen,
    Threads,
    Verbose,
)
from cli.panel import NodePanel
from protocol.errors import UserError
from protocol.invite import Invite

if TYPE_CHECKING:
    from node.sabotage import AttackConfig
    from node.volunteer import Volunteer


def join(
    invite: InviteText,
    stage: Annotated[
        str, typer.Option(help="`auto`, or the number of the stage to serve.", metavar="auto|N")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="`auto`, `cpu` or `cuda:N`.", metavar="auto|cpu|cuda:N")
    ] = "auto",
    listen: Listen = None,
    identity: IdentityFile = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where checkpoints and data are kept.", metavar="DIR")
    ] = None,
    threads: Threads = 0,
    link_delay: Annotated[
        float, typer.Option(help="Milliseconds added to everything sent, to try a slow link.", min=0)
    ] = 0.0,
    attack: AttackSpec = None,
    attack_direction: AttackDirection = "both",
    attack_start: AttackStart = 0,
    duty: Annotated[float, typer.Option(help="Share of the rounds in which it attacks.", min=0, max=1)] = 1.0,
    verbose: Verbose = False,
) -> None:
    """Join a run as a volunteer: serve one stage of the model until Ctrl-C.

    Checks the manifest's signature, picks the least served stage that fits, takes its state from its replicas.
    Ctrl-C leaves gracefully: what this node holds is finished or handed back.

    Examples:

        sentinel-node join sentinel1-...

        sentinel-node join sentinel1-... --stage 2 --device cuda:0

        sentinel-node join sentinel1-... --identity b.key --cache-dir b

        sentinel-node join sentinel1-... --attack random-sign:0.3 --attack-direction gradient
    """
    parsed, wanted = Invite.parse(invite), _parse_stage(stage)
    from node.replica import Limits
    from node.volunteer import Volunteer, VolunteerConfig
    from protocol.host import DEFAULT_LISTEN

    orders = make_attack(attack, attack_direction, attack_start, duty)
    is_terminal = sys.stderr.isatty()
    logs.configure(verbose=verbose, quiet=is_terminal and not verbose)
    running.use_threads(threads)
    home = cache_dir or DEFAULT_HOME
    config = VolunteerConfig(
        invite=parsed,
        identity=identity or home / "node.key",
        cache_dir=home,
        stage=wanted,
        device=device,
        listen=tuple(listen or DEFAULT_LISTEN),
        limits=Limits(link_delay=link_delay / 1e3),
        attack=orders,
    )
    running.run_long(_serve(Volunteer(config), with_panel=is_terminal))


def _parse_stage(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"--stage {text} is not understood", "Give `auto` or a number from 0")
    return int(text)


def make_attack(spec: str | None, direction: str, start: int, duty: float) -> AttackConfig | None:
    """Raises `UserError` for a SPEC that names no attack."""
    if spec is None:
        return None
    from node.sabotage import AttackConfig
    from verifier.saboteur import Orders, parse_attack
    from verifier.streams import Direction

    directions = frozenset(Direction) if direction == "both" else frozenset({Direction(direction)})
    return AttackConfig(parse_attack(spec), Orders(directions, start, duty))


async def _serve(volunteer: Volunteer, *, with_panel: bool) -> None:
    asked = running.stop_asked()
    try:
        await running.until_asked(asked, volunteer.start())
        if asked.is_set():
            return
        with NodePanel(volunteer, enabled=with_panel) as panel:
            await running.until_asked(asked, panel.watch())
        await volunteer.leave()
    finally:
        await volunteer.stop()
