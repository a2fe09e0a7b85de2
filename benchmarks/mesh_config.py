"""What one mesh run is: its size, its attack, its detector; and the manifest that its model and data come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from protocol.errors import UserError
from protocol.manifest import (
    BatchSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    StagesSection,
)
from verifier.streams import Direction

Wiring = Literal["random", "fixed"]
AttackDirection = Literal["activation", "gradient", "both"]

_HEAD_WIDTH = 16
_TOKENS_A_THREAD = 512


@dataclass(frozen=True)
class MeshConfig:
    """A data-parallel x pipeline-parallel mesh: `replicas` x `stages` workers, one microbatch a replica and round.

    `fraction` of the replicas of a stage (rounded down) are malicious from round `warmup` on; `collusion` of the
    attackers act as one. `retries` is how often a refused hop is given to another replica before its microbatch is
    dropped (at least as often as a quorum needs). `evaluate_every` rounds the validation loss is noted, and at the end.
    """

    replicas: int = 8
    stages: int = 16
    rounds: int = 400
    warmup: int = 100
    attack: str | None = None
    attack_direction: AttackDirection = "activation"
    fraction: float = 0.25
    duty: float = 1.0
    collusion: float = 0.0
    wiring: Wiring = "random"
    detector: str = "sentinel"
    data: str = "builtin:pydoc"
    width: int = 64
    context: int = 64
    microbatch: int = 2
    sampling: float = 1.0
    malicious_ends: bool = False
    seed: int = 0
    retries: int = 7
    evaluate_every: int = 25

    def __post_init__(self) -> None:
        _require(self.replicas >= 2, "--replicas must be at least 2", "Write, say, --replicas 8")
        _require(self.stages >= 3, "--stages must be at least 3", "Write, say, --stages 16")
        _require(self.rounds >= 1, "--rounds must be at least 1", "Write, say, --rounds 400")
        _require(self.warmup >= 0, "--warmup must not be negative", "Write, say, --warmup 100")
        _require(
            0 <= self.fraction < 0.5, "--fraction must be from 0 to below 0.5", "Write, say, --fraction 0.25"
        )
        _require(0 < self.duty <= 1, "--duty must be above 0 and at most 1", "Write, say, --duty 0.1")
        _require(0 <= self.collusion <= 1, "--collusion must be from 0 to 1", "Write, say, --collusion 0.6")
        _require(
            0 < self.sampling <= 1, "--sampling must be above 0 and at most 1", "Write, say, --sampling 0.2"
        )
        _require(self.microbatch >= 1, "--microbatch must be at least 1", "Write, say, --microbatch 2")
        _require(self.context >= 8, "--context must be at least 8", "Write, say, --context 64")
        fits = self.width >= _HEAD_WIDTH and self.width % _HEAD_WIDTH == 0
        _require(fits, f"--width must be a multiple of {_HEAD_WIDTH}", "Write, say, --width 64")

    @property
    def directions(self) -> frozenset[Direction]:
        """Where the attack acts."""
        if self.attack_direction == "both":
            return frozenset(Direction)
        return frozenset({Direction(self.attack_direction)})

    @property
    def workers(self) -> int:
        return self.replicas * self.stages

    @property
    def useful_threads(self) -> int:
        """Threads that a stage's batch gives work to: with 256 tokens a second one saves 6% of the time and takes a
        whole processor, with 1,024 it saves a quarter."""
        return max(1, self.replicas * self.microbatch * self.context // _TOKENS_A_THREAD)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def manifest(self) -> Manifest:
        """A Llama of one layer a stage, byte tokens, and a learning rate that suits these small widths."""
        heads = self.width // _HEAD_WIDTH
        config = {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": self.stages,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
        }
        return Manifest(
            name="mesh",
            seed=self.seed,
            testbed=True,
            data=self.data,
            model=ModelSection(config=config),
            stages=StagesSection(cut=tuple(range(self.stages + 1))),
            batch=BatchSection(context=self.context, sequences=self.microbatch, microbatches=self.replicas),
            optimizer=OptimizerSection(lr=3e-3, warmup_rounds=min(20, self.rounds), weight_decay=0.01),
            schedule=ScheduleSection(kind="synchronous", rounds=self.rounds),
        )


def _require(holds: bool, problem: str, remedy: str) -> None:
    if not holds:
        raise UserError(problem, remedy)
