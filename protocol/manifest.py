"""The manifest: a run's constitution, signed by its operator. The run id is its hash.

On disk it is TOML; what is hashed and signed is the canonical JSON of its content (sorted keys, no spaces),
so comments, order and layout of the file do not matter.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protocol.errors import ProtocolError, UserError
from protocol.identity import Identity, PeerId, check_signature, public_key_of
from protocol.votes import Electorate

DOMAIN = b"sentinel/manifest/1"
MAX_BYTES = 256 * 1024

Schedule = Literal["synchronous", "overlapped"]
WireCodec = Literal["fp32", "bf16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(_Section):
    """`config`: a Hugging Face config, with its `model_type`; `tokenizer`: `bytes`, a folder or a hub name."""

    config: dict[str, Any]
    tokenizer: str = "bytes"

    @field_validator("config")
    @classmethod
    def _fits_toml(cls, config: dict[str, Any]) -> dict[str, Any]:
        """TOML has no null; to transformers a key that is absent is its default, as null is."""
        return {key: _without_nulls(value) for key, value in config.items() if value is not None}

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])


class StagesSection(_Section):
    """Stage s has the decoder layers from `cut[s]` up to, not including, `cut[s + 1]`; `cut[-1]` is their number."""

    cut: Annotated[tuple[int, ...], Field(min_length=2)]

    @property
    def count(self) -> int:
        return len(self.cut) - 1


class BatchSection(_Section):
    """A round's batch is `microbatches` x `sequences` x `context` tokens, over all replicas of a stage together."""

    context: Annotated[int, Field(ge=2, le=1 << 20)]
    sequences: Annotated[int, Field(ge=1, le=4096)]
    microbatches: Annotated[int, Field(ge=1, le=4096)]


class OptimizerSection(_Section):
    """AdamW with linear warm-up, then a cosine to `final_lr_fraction` of `lr` at the run's last round.

    `clip` bounds the gradient norm of the whole model: each of S stages clips its own at clip / sqrt(S). 0 is off.
    """

    lr: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip: Annotated[float, Field(ge=0)] = 1.0


class ScheduleSection(_Section):
    """`rounds` is the run's length. Round 0 begins when every stage has `min_replicas` ready replicas."""

    kind: Schedule = "overlapped"
    rounds: Annotated[int, Field(ge=1)]
    min_replicas: Annotated[int, Field(ge=1, le=4096)] = 1


class VerificationSection(_Section):
    """Who judges, how much they look at, and what it takes to ban. Without `verifiers` nobody is judged.

    `sampling`: share of the microbatches that each verifier asks for; `alpha`: the chance of ever banning an honest
    peer that the sequential test may take; `guard`: robust standard deviations of the marginal score beyond which a
    receiver uses no tensor; `term`: seconds that a vote, and so a ban, holds unless it is repeated.
    """

    verifiers: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    quorum: Annotated[int, Field(ge=1)] = 1
    sampling: Annotated[float, Field(gt=0, le=1)] = 0.04
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    guard: Annotated[float, Field(gt=0)] = 6.0
    term: Annotated[int, Field(ge=1, le=10 * 365 * 86400)] = 86400

    @model_validator(mode="after")
    def _can_reach_its_quorum(self) -> Self:
        for verifier in self.verifiers:
            try:
                public_key_of(verifier)
            except ProtocolError as error:
                raise ValueError(f"verification.verifiers: {verifier:.60}: {error.detail}") from None
        count = len(self.verifiers)
        if len(set(self.verifiers)) != count:
            raise ValueError("verification.verifiers names one twice")
        lowest = least_quorum(count)
        # A minority must not be able to ban: with half of them or less it could.
        if count and not lowest <= self.quorum <= count:
            raise ValueError(f"verification.quorum of {count} verifiers must be {lowest} to {count}")
        return self


def least_quorum(verifiers: int) -> int:
    """The smallest majority of so many."""
    return verifiers // 2 + 1


class Manifest(_Section):
    """Everything that peers of one run must agree on. Build with `Manifest(...)`, share with `sign` and `write`."""

    format: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[\w. -]+$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    testbed: bool = False
    data: Annotated[str, Field(min_length=1)]
    wire: WireCodec = "fp32"
    model: ModelSection
    stages: StagesSection
    batch: BatchSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    verification: VerificationSection = VerificationSection()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        cut, config = self.stages.cut, self.model.config
        for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
            if key not in config:
                raise ValueError(f"model.config lacks `{key}`")
        if cut[0] != 0 or cut[-1] != self.model.layers or list(cut) != sorted(set(cut)):
            raise ValueError(f"stages.cut must rise strictly from 0 to {self.model.layers}, not {list(cut)}")
        if self.batch.context > int(config.get("max_position_embeddings", self.batch.context)):
            raise ValueError("batch.context is longer than the model's max_position_embeddings")
        return self

    def canonical(self) -> bytes:
        """What is hashed and signed: JSON with sorted keys and no spaces, UTF-8."""
        return json.dumps(self.body(), sort_keys=True, separators=(",", ":")).encode()

    def body(self) -> dict[str, Any]:
        """The content as plain data. A run without verification says nothing about it, as before there was any."""
        body = self.model_dump(mode="json")
        if self.verification == VerificationSection():
            del body["verification"]
        return body


class SignedManifest(_Section):
    """A manifest, its operator and the signature that ties them. Verified when built by `read` or `parse`."""

    manifest: Manifest
    operator: str
    signature: str

    @property
    def run(self) -> bytes:
        """The run id: 32 bytes of BLAKE3 over the operator's PeerID and the manifest."""
        return blake3(self.operator.encode() + b"\x00" + self.manifest.canonical()).digest()

    @property
    def electorate(self) -> Electorate:
        """Who may vote in this run, and how many it takes."""
        policy = self.manifest.verification
        verifiers = frozenset(PeerId(verifier) for verifier in policy.verifiers)
        return Electorate(self.run, verifiers, policy.quorum, policy.term)

    @classmethod
    def sign(cls, manifest: Manifest, operator: Identity) -> SignedManifest:
        signature = operator.sign(DOMAIN, manifest.canonical())
        return cls(manifest=manifest, operator=operator.peer_id, signature=signature.hex())

    def to_toml(self) -> str:
        seal = {"operator": self.operator, "signature": self.signature}
        return tomli_w.dumps({**self.manifest.body(), "seal": seal})

    def write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".part")
            try:
                temporary.write_text(self.to_toml())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot write {path}: {error.strerror}", "Free space, or name a writable place with --out"
            ) from None

    @classmethod
    def read(cls, path: Path) -> SignedManifest:
        """Raises `UserError` if the file is missing, is no manifest, or was altered after it was signed."""
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(
                f"Cannot read the manifest {path}: {error.strerror}", "Make one: sentinel-node init"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is no text, so no manifest", "Make one: sentinel-node init") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> SignedManifest:
        """Parse and verify TOML from `source` (a name for error messages). Raises `UserError`."""
        remedy = "Get the operator's original again, or make a new run: sentinel-node init"
        if len(text) > MAX_BYTES:
            raise UserError(f"The manifest from {source} is over {MAX_BYTES} bytes", remedy)
        try:
            body = tomllib.loads(text)
            seal = body.pop("seal")
            signed = cls(manifest=Manifest(**body), operator=seal["operator"], signature=seal["signature"])
            signature, content = bytes.fromhex(signed.signature), signed.manifest.canonical()
        except (
            tomllib.TOMLDecodeError,
            ValidationError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise UserError(
                f"The manifest from {source} is not valid: {_first_line(error)}", remedy
            ) from None
        try:
            check_signature(signed.operator, DOMAIN, content, signature)
        except ProtocolError:
            raise UserError(f"The manifest from {source} was altered after it was signed", remedy) from None
        return signed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        if None in value:
            raise ValueError("null in a list cannot be written as TOML")
        return [_without_nulls(one) for one in value]
    return value


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return f"{type(error).__name__}: {error}".splitlines()[0]
