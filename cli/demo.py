"""`sentinel-node demo`: a whole swarm on this machine, live."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import files, logs, running
from cli.demo_display import DemoDisplay
from cli.options import AttackDirection, AttackStart, Schedule, Wire
from protocol.errors import UserError

if TYPE_CHECKING:
    from benchmarks.demo import Threat


def demo(
    stages: Annotated[int, typer.Option(help="How many stages the model is cut into.", min=1)] = 3,
    replicas: Annotated[int, typer.Option(help="Volunteers that serve each stage.", min=1)] = 3,
    rounds: Annotated[int, typer.Option(help="How many rounds to train.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the samples.", min=0)] = 0,
    schedule: Schedule = "overlapped",
    wire: Wire = "fp32",
    link_delay: Annotated[
        float, typer.Option(help="Milliseconds added to everything a volunteer sends.", min=0)
    ] = 0.0,
    verifiers: Annotated[int, typer.Option(help="Verifier peers; 0 for none.", min=0, max=64)] = 3,
    quorum: Annotated[
        int | None, typer.Option(help="Verifiers that it takes to ban; unless given, a majority.", min=1)
    ] = None,
    malicious: Annotated[
        int | None,
        typer.Option(
            help="Attackers among the volunteers, in inner stages; 0 for none. Unless given, one where there is room.",
            min=0,
        ),
    ] = None,
    attack: Annotated[
        str, typer.Option(help="What they do: `zeros`, `flip`, `delay:20`, ...", metavar="SPEC")
    ] = "random-sign:0.3",
    attack_direction: AttackDirection = "both",
    attack_start: AttackStart = 10,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep manifest, keys and logs in this folder.", metavar="DIR")
    ] = None,
) -> None:
    """Start a bootstrap peer and volunteers as processes on this machine, and train a small model on real text.

    The processes run `sentinel-node bootstrap`, `verify` and `join`, as one would by hand on several machines. One of
    the volunteers attacks; the verifiers find it, and the others route around it.

    Examples:

        sentinel-node demo

        sentinel-node demo --attack zeros --attack-direction activation

        sentinel-node demo --stages 2 --replicas 1 --rounds 20 --verifiers 0

        sentinel-node demo --schedule synchronous --link-delay 100

        sentinel-node demo --json result.json --keep logs
    """
    if output is not None:
        files.check_writable(output, "--json")
    if keep is not None:
        files.check_writable(keep / "run.toml", "--keep")
    from benchmarks.demo import Threat, run_demo
    from node.presets import build_manifest
    from protocol.manifest import least_quorum
    from verifier.saboteur import parse_attack

    parse_attack(attack)
    if quorum is None:
        quorum = least_quorum(verifiers)
    if malicious is None:
        malicious = int(stages > 2 and replicas > 1)
    threat = Threat(verifiers, quorum, malicious, attack, attack_direction, attack_start)
    _check_threat(threat, stages, replicas)

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
            manifest,
            keep or Path(scratch),
            replicas=replicas,
            threat=threat,
            link_delay=link_delay / 1e3,
            show=display.show,
        )
        result = running.run(running.interruptible(work))
    if result is None:
        raise typer.Exit(running.INTERRUPTED)
    display.summarise(result)
    if output is not None:
        files.write_json(output, result, "--json")


def _check_threat(threat: Threat, stages: int, replicas: int) -> None:
    """Raises `UserError` for what cannot be played."""
    from protocol.manifest import least_quorum

    lowest = least_quorum(threat.verifiers)
    if threat.verifiers and not lowest <= threat.quorum <= threat.verifiers:
        problem = f"--quorum {threat.quorum} is no majority of {threat.verifiers} verifiers"
        raise UserError(problem, f"Use {lowest} to {threat.verifiers}")
    most = max((replica + 1 for _, replica in threat.places(stages)), default=0)
    if most >= replicas:
        raise UserError(
            f"{threat.malicious} attackers leave no honest volunteer on a stage",
            "Use fewer with --malicious, or more --replicas",
        )
