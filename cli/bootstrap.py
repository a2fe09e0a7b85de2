"""`sentinel-node bootstrap`: host a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bootstrap.seed import Seed
from cli import logs, running
from cli.options import DEFAULT_HOME, IdentityFile, Listen, Verbose
from protocol.host import DEFAULT_LISTEN
from protocol.manifest import SignedManifest


def bootstrap(
    manifest: Annotated[
        Path, typer.Option(help="The signed manifest that `init` wrote.", metavar="run.toml")
    ],
    listen: Listen = None,
    identity: IdentityFile = None,
    verbose: Verbose = False,
) -> None:
    """Be a run's seed: entry point of the DHT, relay, and server of the manifest. Prints one invite on stdout.

    Example: `sentinel-node bootstrap --manifest run.toml --listen /ip4/0.0.0.0/tcp/31337`

    Give it a fixed port and keep its identity file, and the invite stays good after a restart.
    """
    logs.configure(verbose=verbose)
    signed = SignedManifest.read(manifest)
    key = identity or DEFAULT_HOME / f"bootstrap-{signed.run.hex()[:16]}.key"
    running.run(_serve(Seed(signed, key, tuple(listen or DEFAULT_LISTEN))))


async def _serve(seed: Seed) -> None:
    asked = running.stop_asked()
    try:
        print(await seed.start(), flush=True)
        await asked.wait()
    finally:
        await seed.stop()
