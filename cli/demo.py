"""`sentinel-node demo`: a whole swarm on this machine, live."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cli import files, logs, running
from cli.demo_display import DemoDisplay
from cli.options import Schedule, Wire


def demo(
    stages: Annotated[int, typer.Option(help="How many stages the model is cut into.", min=1)] = 3,
    replicas: Annotated[int, typer.Option(help="Volunteers that serve each stage.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="How many rounds to train.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the samples.", min=0)] = 0,
    schedule: Schedule = "overlapped",
    wire: Wire = "fp32",
    link_delay: Annotated[
        float, typer.Option(help="Milliseconds added to everything a volunteer sends.", min=0)
    ] = 0.0,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep manifest, keys and logs in this folder.", metavar="DIR")
    ] = None,
) -> None:
    """Start a bootstrap peer and volunteers as processes on this machine, and train a small model on real text.

    The processes run `sentinel-node bootstrap` and `sentinel-node join`, as one would by hand on several machines.

    Examples:

        sentinel-node demo

        sentinel-node demo --stages 2 --replicas 1 --rounds 20

        sentinel-node demo --schedule synchronous --link-delay 100

        sentinel-node demo --json result.json --keep logs
    """
    if output is not None:
        files.check_writable(output, "--json")
    if keep is not None:
        files.check_writable(keep / "run.toml", "--keep")
    from benchmarks.demo import run_demo
    from node.presets import build_manifest

    logs.configure(quiet=True)
    manifest = build_manifest(
        preset="tiny",
        config=None,
        stages=stages,
        data="builtin:pydoc",
        tokenizer="bytes",
        seed=seed,
        testbed=True,
        schedule=schedule,
        rounds=rounds,
        min_replicas=replicas,
        wire=wire,
        name="demo",
    )
    with tempfile.TemporaryDirectory(prefix="sentinel-demo-") as scratch, DemoDisplay() as display:
        work = run_demo(
            manifest, keep or Path(scratch), replicas=replicas, link_delay=link_delay / 1e3, show=display.show
        )
        result = running.run(running.interruptible(work))
    if result is None:
        raise typer.Exit(running.INTERRUPTED)
    display.summarise(result)
    if output is not None:
        files.write_json(output, result, "--json")
