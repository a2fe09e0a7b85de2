"""`sentinel-node simulate`: one mesh of workers, attacked and judged, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cli import files
from protocol.errors import UserError

if TYPE_CHECKING:
    from benchmarks.mesh_config import MeshConfig


def simulate(
    replicas: Annotated[int, typer.Option(help="Workers per stage.")] = 8,
    stages: Annotated[int, typer.Option(help="Pipeline stages, one decoder layer each.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds of training.")] = 400,
    warmup: Annotated[int, typer.Option(help="Rounds before the attack starts; 0 for none.")] = 100,
    attack: Annotated[
        str | None,
        typer.Option(
            help="An attack of the suite, such as `flip` or `noise:0.5`, or `FILE.py:CLASS`.", metavar="SPEC"
        ),
    ] = None,
    attack_direction: Annotated[
        str, typer.Option(help="What is corrupted: `activation`, `gradient` or `both`.", metavar="WHAT")
    ] = "activation",
    fraction: Annotated[
        float, typer.Option(help="Share of malicious replicas in a stage, rounded down.")
    ] = 0.25,
    duty: Annotated[float, typer.Option(help="Share of rounds in which attackers act.")] = 1.0,
    collusion: Annotated[float, typer.Option(help="Share of the attackers that act as one.")] = 0.0,
    wiring: Annotated[
        str, typer.Option(help="Who works with whom: `random` or `fixed`.", metavar="KIND")
    ] = "random",
    detector: Annotated[
        str,
        typer.Option(
            help="Who judges: `sentinel`, `marginal`, `none`, `duplicate` or `FILE.py:CLASS`.", metavar="NAME"
        ),
    ] = "sentinel",
    data: Annotated[
        str,
        typer.Option(help="`builtin:pydoc`, `text:GLOB` or `hf:NAME[:CONFIG[:SPLIT]]`.", metavar="SPEC"),
    ] = "builtin:pydoc",
    width: Annotated[int, typer.Option(help="Width of the model.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens a sequence.")] = 64,
    microbatch: Annotated[int, typer.Option(help="Sequences a microbatch.")] = 2,
    sampling: Annotated[float, typer.Option(help="Share of steps that are judged in full.")] = 1.0,
    malicious_ends: Annotated[
        bool, typer.Option("--malicious-ends", help="Attackers in the first and last stages too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, samples, attackers and wiring.", min=0)] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result there.", metavar="FILE")
    ] = None,
) -> None:
    """Train a mesh of workers with attackers among them, and see who is banned and what it costs.

    Replicas of a stage share weights, so one batched pass with per-worker corruption is the whole mesh.

    Examples:

        sentinel-node simulate --attack noise:0.5 --json result.json

        sentinel-node simulate --fraction 0.375 \\
            --attack flip --attack-direction gradient
    """
    from benchmarks.mesh_config import MeshConfig

    config = MeshConfig(
        replicas=replicas,
        stages=stages,
        rounds=rounds,
        warmup=warmup,
        attack=attack,
        attack_direction=_one_of("--attack-direction", attack_direction, ("activation", "gradient", "both")),
        fraction=fraction,
        duty=duty,
        collusion=collusion,
        wiring=_one_of("--wiring", wiring, ("random", "fixed")),
        detector=detector,
        data=data,
        width=width,
        context=context,
        microbatch=microbatch,
        sampling=sampling,
        malicious_ends=malicious_ends,
        seed=seed,
    )
    if json_file is not None:
        files.check_writable(json_file, "--json")
    summary = _run(config)
    if json_file is not None:
        files.write_json(json_file, summary, "--json")
    Console().print(_table(summary))


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UserError(f"{flag} cannot be {value}", f"Use one of {', '.join(allowed)}")
    return value


def _run(config: MeshConfig) -> dict[str, Any]:
    import torch

    from benchmarks.mesh import run_mesh
    from benchmarks.mesh_report import summarise

    torch.set_num_threads(min(torch.get_num_threads(), config.useful_threads))
    columns = (TextColumn("round"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=config.rounds)
        return summarise(run_mesh(config, lambda _: progress.advance(task)))


def _table(summary: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False)
    for key, value in summary.items():
        if key == "bans":
            table.add_row("banned", str(len(value)))
        elif not isinstance(value, (list, dict)):
            table.add_row(key.replace("_", " "), _show(value))
    return table


def _show(value: float | None) -> str:
    if value is None:
        return "none"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
