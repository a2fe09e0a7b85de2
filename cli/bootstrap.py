"""`sentinel-node bootstrap`: host a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import logs, running
from cli.options import DEFAULT_HOME, IdentityFile, Listen, Verbose
from protocol.errors import UserError
from protocol.invite import Invite

if TYPE_CHECKING:
    from bootstrap.seed import Seed


def bootstrap(
    manifest: Annotated[
        Path, typer.Option(help="The signed manifest that `init` wrote.", metavar="run.toml")
    ],
    listen: Listen = None,
    identity: IdentityFile = None,
    other: Annotated[
        str | None,
        typer.Option(
            "--with", help="Invite of another seed of this run; ours will name both.", metavar="INVITE"
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Be a run's seed: entry point of the DHT, relay, and server of the manifest. Prints one invite on stdout.

    Give it fixed ports and keep its identity file, and the invite stays good after a restart.

    Examples:

        sentinel-node bootstrap --manifest run.toml

        sentinel-node bootstrap --manifest run.toml --identity seed.key \\
            --listen /ip4/0.0.0.0/tcp/31337 \\
            --listen /ip4/0.0.0.0/udp/31337/quic-v1

        sentinel-node bootstrap --manifest run.toml --with sentinel1-...
    """
    beside = Invite.parse(other) if other is not None else None
    from bootstrap.seed import Seed
    from protocol.host import DEFAULT_LISTEN
    from protocol.manifest import SignedManifest

    logs.configure(verbose=verbose)
    signed = SignedManifest.read(manifest)
    if beside is not None and beside.run != signed.run:
        raise UserError("The invite given with --with is of another run", "Give one of this manifest's run")
    key = identity or DEFAULT_HOME / f"bootstrap-{signed.run.hex()[:16]}.key"
    seeds = beside.seeds if beside is not None else ()
    running.run(_serve(Seed(signed, key, tuple(listen or DEFAULT_LISTEN), seeds)))


async def _serve(seed: Seed) -> None:
    asked = running.stop_asked()
    try:
        invite = await running.until_asked(asked, seed.start())
        if invite is not None:
            print(invite, flush=True)
            await running.until_asked(asked, seed.wait())
    finally:
        await seed.stop()
