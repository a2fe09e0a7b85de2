"""Manifests from presets, or from any Hugging Face config with defaults that follow from its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from node.data import parse_spec
from node.model import check_untied, meta_model
from protocol.errors import UserError
from protocol.manifest import (
    BatchSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    StagesSection,
    VerificationSection,
)


@dataclass(frozen=True)
class Preset:
    """A model with the batch, the optimizer and the length of run that suit it."""

    config: dict[str, Any]
    stages: int
    rounds: int
    batch: BatchSection
    optimizer: OptimizerSection


# Trains on bytes in minutes on two laptop cores, spread over six peers. Six layers divide into 2, 3 and 6 stages.
_TINY = Preset(
    config={
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # Four times the usual spread: sixty steps are too few to grow out of weights near zero.
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
    },
    stages=3,
    rounds=60,
    # Nearly half of a microbatch's cost in all processes does not depend on its size, so few large ones; and yet so
    # many that not most of a round's are in flight when it ends, and that one soon sees who corrupts some.
    batch=BatchSection(context=64, sequences=6, microbatches=10),
    # No momentum: it makes gradients that are one round old overshoot (and does not help without delay either). Every
    # round's gradient is clipped, so that one that is far too large counts no more than another. In one process a rate
    # of 2e-3 ends 0.03 lower, with equal runs twice as far apart.
    optimizer=OptimizerSection(lr=1.4e-3, beta1=0.0, warmup_rounds=10, clip=0.1),
)

# The paper's: Llama-3 0.6B, 16 layers, width 1024, context 1024, 16 stages, 5,000 steps. Llama-3 means its vocabulary
# (128,256), its rope_theta (500,000) and norm_eps. Ours, because the paper does not say: heads, untied embeddings,
# an MLP width that makes it 0.59B weights, batch and optimizer.
_LLAMA_600M = Preset(
    config={
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 1024,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    stages=16,
    rounds=5000,
    batch=BatchSection(context=1024, sequences=2, microbatches=128),
    optimizer=OptimizerSection(lr=4e-4, warmup_rounds=200),
)

PRESETS = {"tiny": _TINY, "llama-600m": _LLAMA_600M}

# Peak learning rate and tokens per round by number of weights: the trend of published runs (GPT-3, Llama, Pythia).
_DEFAULTS_BY_SIZE = (
    (5e6, 5e-3, 8_192),
    (3e7, 2e-3, 32_768),
    (2e8, 6e-4, 262_144),
    (1.5e9, 4e-4, 524_288),
    (1e10, 3e-4, 2_097_152),
    (float("inf"), 1.5e-4, 4_194_304),
)
_MICROBATCH_TOKENS = 2048
_LONGEST_CONTEXT = 1024


def build_manifest(
    *,
    preset: str | None,
    config: dict[str, Any] | None,
    stages: int | None,
    data: str,
    tokenizer: str,
    seed: int,
    testbed: bool,
    schedule: str,
    rounds: int | None,
    min_replicas: int,
    wire: str,
    name: str,
    verification: VerificationSection | None = None,
) -> Manifest:
    """The manifest of a run. Give `preset` or `config` (a Hugging Face config with `model_type`), not both.

    None for `stages` or `rounds` takes the preset's; without `verification` nobody is judged. Raises `UserError` for
    what does not make a run.
    """
    parse_spec(data)
    base = _choose(preset, config)
    count = base.stages if stages is None else stages
    length = base.rounds if rounds is None else rounds
    try:
        model = ModelSection(config=base.config, tokenizer=tokenizer)
        check_untied(meta_model(model), count)
        body = {
            "name": name,
            "seed": seed,
            "testbed": testbed,
            "data": data,
            "wire": wire,
            "model": model,
            "stages": StagesSection(cut=even_cut(model, count, base.batch.context)),
            "batch": base.batch,
            "optimizer": _shorten_warmup(base.optimizer, length),
            "schedule": {"kind": schedule, "rounds": length, "min_replicas": min_replicas},
            "verification": verification or VerificationSection(),
        }
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise UserError(f"{place} cannot be {first['input']!r:.80}", f"{first['msg']}") from None


def even_cut(model: ModelSection, stages: int, context: int) -> tuple[int, ...]:
    """The cut into `stages` whose slowest stage is fastest. The LM head counts, the embedding is a look-up and free.

    Raises `UserError` unless there is a layer for every stage.
    """
    if not 1 <= stages <= model.layers:
        raise UserError(
            f"{model.layers} layers cannot be cut into {stages} stages", f"Use 1 to {model.layers} stages"
        )
    layers, head = _compute(model, context)
    before = [sum(layers[:end]) for end in range(len(layers) + 1)]

    def cost(low: int, high: int) -> float:
        return before[high] - before[low] + (head if high == len(layers) else 0.0)

    # best[high], for layers 0..high-1: the slowest stage, the sum of squares (to even out the rest too), the cut.
    Best = tuple[float, float, tuple[int, ...]]
    best: dict[int, Best] = {
        high: (cost(0, high), cost(0, high) ** 2, (0, high)) for high in range(1, len(layers) + 1)
    }
    for made in range(2, stages + 1):
        best = {
            high: min(
                (
                    max(best[low][0], cost(low, high)),
                    best[low][1] + cost(low, high) ** 2,
                    (*best[low][2], high),
                )
                for low in range(made - 1, high)
            )
            for high in range(made, len(layers) + 1)
        }
    return best[len(layers)][2]


def _compute(model: ModelSection, context: int) -> tuple[list[float], float]:
    """Multiplications per token of each decoder layer and of the LM head: their weights, and the attention itself."""
    causal_lm = meta_model(model)
    attention = context * model.width  # Scores and values, half of each behind the causal mask.
    layers = [float(_weights(layer) + attention) for layer in causal_lm.model.layers]
    return layers, float(_weights(causal_lm.lm_head))


def _weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _choose(preset: str | None, config: dict[str, Any] | None) -> Preset:
    if (preset is None) == (config is None):
        raise UserError(
            "A run needs a preset or a model config, and not both", f"Presets: {', '.join(PRESETS)}"
        )
    if config is not None:
        return _preset_for(config)
    if preset not in PRESETS:
        raise UserError(
            f"There is no preset {preset}", f"Use one of {', '.join(PRESETS)}, or give a model config"
        )
    return PRESETS[preset]


def _preset_for(config: dict[str, Any]) -> Preset:
    """Defaults for any model, by its size."""
    for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        if key not in config:
            raise UserError(
                f"The model config lacks `{key}`", "Give a decoder's config.json from the Hugging Face hub"
            )
    # Where nothing is said, untied: tying puts one weight on two stages, and is the default of some architectures.
    config = {"tie_word_embeddings": False, **config}
    model = ModelSection(config=config)
    weights = _weights(meta_model(model))
    lr, tokens = next((lr, tokens) for limit, lr, tokens in _DEFAULTS_BY_SIZE if weights <= limit)
    longest = 128 if weights <= _DEFAULTS_BY_SIZE[0][0] else _LONGEST_CONTEXT
    context = min(longest, int(config.get("max_position_embeddings", longest)))
    sequences = max(1, min(_MICROBATCH_TOKENS, tokens // 16) // context)
    microbatches = min(4096, max(1, tokens // (context * sequences)))
    return Preset(
        config=config,
        stages=min(model.layers, 3),
        rounds=1000,
        batch=BatchSection(context=context, sequences=sequences, microbatches=microbatches),
        optimizer=OptimizerSection(lr=lr, warmup_rounds=50),
    )


def _shorten_warmup(optimizer: OptimizerSection, rounds: int) -> OptimizerSection:
    """A run shorter than planned should not end in its warm-up."""
    return optimizer.model_copy(update={"warmup_rounds": min(optimizer.warmup_rounds, rounds // 5)})
