"""`sentinel-node init`: found a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import files, logs
from cli.options import Schedule, Wire
from protocol.errors import UserError


def init(
    out: Annotated[
        Path, typer.Option(help="The manifest to write; the operator key goes beside it.", metavar="run.toml")
    ],
    preset: Annotated[str | None, typer.Option(help="`tiny` or `llama-600m`.", metavar="NAME")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Any Hugging Face config.json instead of a preset.", metavar="FILE")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="How many stages the model is cut into.", min=1)] = None,
    data: Annotated[
        str,
        typer.Option(help="`builtin:pydoc`, `text:GLOB` or `hf:NAME[:CONFIG[:SPLIT]]`.", metavar="SPEC"),
    ] = "builtin:pydoc",
    tokenizer: Annotated[
        str, typer.Option(help="`bytes`, or a Hugging Face tokenizer by folder or name.", metavar="NAME")
    ] = "bytes",
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the samples.", min=0)] = 0,
    testbed: Annotated[
        bool, typer.Option("--testbed", help="Allow volunteers that attack, for experiments.")
    ] = False,
    schedule: Schedule = "overlapped",
    rounds: Annotated[int | None, typer.Option(help="Length of the run.", min=1)] = None,
    min_replicas: Annotated[
        int, typer.Option(help="Replicas a stage needs before the first round.", min=1)
    ] = 1,
    wire: Wire = "fp32",
    name: Annotated[str, typer.Option(help="The run's name.")] = "sentinel run",
) -> None:
    """Write a signed manifest, and the operator key beside it (readable by you alone).

    An operator key that is there already is used again; a manifest of another run is not overwritten.

    Examples:

        sentinel-node init --preset tiny --out run.toml

        sentinel-node init --preset tiny --stages 2 --out run.toml \\
            --data 'text:books/*.txt'

        sentinel-node init --preset llama-600m --stages 16 --out run.toml \\
            --data hf:allenai/c4:en --tokenizer NAME

        sentinel-node init --config config.json --stages 4 --out run.toml
    """
    logs.configure(quiet=True)
    model_config = _read_config(config)
    files.check_writable(out, "--out")
    from node.data import open_tokenizer
    from node.presets import build_manifest
    from protocol.identity import Identity
    from protocol.manifest import SignedManifest

    manifest = build_manifest(
        preset=preset,
        config=model_config,
        stages=stages,
        data=data,
        tokenizer=tokenizer,
        seed=seed,
        testbed=testbed,
        schedule=schedule,
        rounds=rounds,
        min_replicas=min_replicas,
        wire=wire,
        name=name,
    )
    open_tokenizer(manifest)  # Whoever heads a stage would find out otherwise.
    key = out.with_suffix(".operator.key")
    signed = SignedManifest.sign(manifest, Identity.load_or_create(key))
    if out.exists() and SignedManifest.read(out).run != signed.run:
        raise UserError(
            f"{out} is the manifest of another run", "Name another file with --out, or move it away"
        )
    signed.write(out)
    print(f"manifest      {out}")
    print(f"operator key  {key}  (keep it secret: whoever has it speaks for the run)")
    print(f"run           {signed.run.hex()}")
    print(f"next          sentinel-node bootstrap --manifest {out}")


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    remedy = "Name a Hugging Face config.json with --config"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"The config {path} is no JSON ({error})", remedy) from None
    if not isinstance(config, dict):
        raise UserError(f"The config {path} is JSON, but no object", remedy)
    return config
