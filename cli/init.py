"""`sentinel-node init`: found a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import files, logs
from cli.options import Schedule, Wire
from protocol.errors import UserError

if TYPE_CHECKING:
    from protocol.identity import Identity
    from protocol.manifest import VerificationSection


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
    verifiers: Annotated[
        int, typer.Option(help="Make so many verifier keys, beside the manifest.", min=0, max=64)
    ] = 0,
    verifier: Annotated[
        list[str] | None,
        typer.Option(help="Name a verifier that has a key; may be given several times.", metavar="PEERID"),
    ] = None,
    quorum: Annotated[
        int | None, typer.Option(help="Verifiers it takes to ban; by default a majority.", min=1)
    ] = None,
) -> None:
    """Write a signed manifest, and the operator key beside it (readable by you alone).

    Keys that are there already are used again; a manifest of another run is not overwritten.

    Examples:

        sentinel-node init --preset tiny --out run.toml

        sentinel-node init --preset tiny --stages 2 --out run.toml \\
            --data 'text:books/*.txt'

        sentinel-node init --preset llama-600m --stages 16 --out run.toml \\
            --data hf:allenai/c4:en --tokenizer NAME

        sentinel-node init --config config.json --stages 4 --out run.toml

        sentinel-node init --preset tiny --out run.toml \\
            --verifiers 3 --quorum 2
    """
    logs.configure(quiet=True)
    model_config = _read_config(config)
    files.check_writable(out, "--out")
    from node.data import open_tokenizer
    from node.presets import build_manifest
    from protocol.identity import Identity
    from protocol.manifest import SignedManifest

    keys = _verifier_keys(out, verifiers)
    named = [*(identity.peer_id for identity in keys.values()), *(verifier or ())]
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
        verification=_verification(named, quorum),
    )
    open_tokenizer(manifest)  # Whoever heads a stage would find out otherwise.
    key = out.with_suffix(".operator.key")
    signed = SignedManifest.sign(manifest, Identity.load_or_create(key))
    if out.exists() and SignedManifest.read(out).run != signed.run:
        raise UserError(
            f"{out} is the manifest of another run", "Name another file with --out, or move it away"
        )
    for path, identity in keys.items():
        if not path.exists():
            identity.save(path)
    signed.write(out)
    print(f"manifest      {out}")
    print(f"operator key  {key}  (keep it secret: whoever has it speaks for the run)")
    for path, identity in keys.items():
        print(f"verifier key  {path}  ({identity.peer_id})")
    print(f"run           {signed.run.hex()}")
    print(f"next          sentinel-node bootstrap --manifest {out}")


def _verifier_keys(out: Path, count: int) -> dict[Path, Identity]:
    """The keys of `count` verifiers and where they go; those not there yet are made, and written by the caller."""
    from protocol.identity import Identity

    paths = [out.with_suffix(f".verifier{number}.key") for number in range(1, count + 1)]
    return {path: Identity.load(path) if path.exists() else Identity.generate() for path in paths}


def _verification(verifiers: list[str], quorum: int | None) -> VerificationSection:
    """Raises `UserError` for a PeerID that is none, or a quorum that cannot be reached or is no majority."""
    from protocol.errors import ProtocolError
    from protocol.identity import public_key_of
    from protocol.manifest import VerificationSection, least_quorum

    count = len(verifiers)
    if not count:
        if quorum is not None:
            raise UserError("--quorum is of nobody", "Make verifiers with --verifiers N, or name some")
        return VerificationSection()
    for verifier in verifiers:
        try:
            public_key_of(verifier)
        except ProtocolError as error:
            remedy = "Give the 52 characters that begin with 12D3KooW"
            raise UserError(f"--verifier {verifier:.60} is not understood: {error.detail}", remedy) from None
    if len(set(verifiers)) != count:
        raise UserError("A verifier is named twice", "Each has one vote: name it once")
    lowest = least_quorum(count)
    quorum = lowest if quorum is None else quorum
    if quorum > count:
        raise UserError(
            f"{count} verifiers cannot make a quorum of {quorum}", f"Use --quorum {count} or less"
        )
    if quorum < lowest:
        raise UserError(
            f"With a quorum of {quorum} a minority of the {count} verifiers could ban anybody",
            f"Use --quorum {lowest} or more",
        )
    return VerificationSection(verifiers=tuple(verifiers), quorum=quorum)


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
