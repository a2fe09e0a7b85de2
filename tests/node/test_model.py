"""Stages cut from Hugging Face decoders: together they are the uncut model, whatever the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from node.model import StageModule, build_stage, build_uncut, parameter_bytes
from protocol.errors import UserError
from protocol.manifest import (
    BatchSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    StagesSection,
)

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", **SHAPE}
QWEN3 = {"model_type": "qwen3", **SHAPE}
# Two kinds of layer, which transformers looks up by position: a stage must not take another layer's kind.
SLIDING = {
    **QWEN3,
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
MIXTRAL = {"model_type": "mixtral", **SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}


def make_manifest(config: dict[str, Any], cut: tuple[int, ...], seed: int = 1) -> Manifest:
    return Manifest(
        name="test",
        seed=seed,
        data="builtin:pydoc",
        model=ModelSection(config=config),
        stages=StagesSection(cut=cut),
        batch=BatchSection(context=16, sequences=2, microbatches=2),
        optimizer=OptimizerSection(lr=1e-3),
        schedule=ScheduleSection(rounds=3),
    )


def build_all(manifest: Manifest) -> list[StageModule]:
    return [build_stage(manifest, stage, CPU) for stage in range(manifest.stages.count)]


def weights_in_order(stages: list[StageModule]) -> list[Tensor]:
    """Of the decoder layers, from first to last."""
    return [
        parameter for stage in stages for name, parameter in stage.named_parameters() if ".layers." in name
    ]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config", [LLAMA, QWEN3, SLIDING, MIXTRAL], ids=["llama", "qwen3", "sliding", "mixtral"]
)
@pytest.mark.parametrize("cut", [(0, 2, 4), (0, 1, 3, 4)])
def test_chained_stages_are_the_uncut_model(
    config: dict[str, Any], cut: tuple[int, ...], tokens: Tensor
) -> None:
    manifest = make_manifest(config, cut)
    stages, uncut = build_all(manifest), build_uncut(manifest, CPU)
    hidden = inputs = tokens[:, :-1]
    for stage in stages[:-1]:
        hidden = stage(hidden)
        assert hidden.shape == (2, 16, 32)
    assert torch.allclose(stages[-1](hidden), uncut(inputs), atol=1e-6)
    assert torch.allclose(
        stages[-1].loss(hidden, tokens[:, 1:]), uncut.loss(inputs, tokens[:, 1:]), atol=1e-6
    )


@pytest.mark.parametrize("config", [LLAMA, SLIDING], ids=["llama", "sliding"])
def test_the_uncut_model_is_what_transformers_computes(config: dict[str, Any], tokens: Tensor) -> None:
    uncut = build_uncut(make_manifest(config, (0, 4)), CPU)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(uncut.causal_lm.state_dict())
    expected = theirs(input_ids=tokens, labels=tokens).loss
    assert torch.allclose(uncut.loss(tokens[:, :-1], tokens[:, 1:]), expected, atol=1e-5)


def test_initial_weights_depend_on_seed_and_place_only() -> None:
    one = weights_in_order(build_all(make_manifest(LLAMA, (0, 4))))
    for cut in ((0, 2, 4), (0, 1, 2, 3, 4)):
        other = weights_in_order(build_all(make_manifest(LLAMA, cut)))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], weights_in_order(build_all(make_manifest(LLAMA, (0, 4), seed=2)))[0])
    per_layer = len(one) // 4
    assert not torch.equal(one[0], one[per_layer]), "layers differ from one another"


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_stage(make_manifest(LLAMA, (0, 2, 4)), 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_stage_holds_only_its_part() -> None:
    manifest = make_manifest(LLAMA, (0, 1, 4))
    first, last = build_all(manifest)
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    for index, stage in enumerate((first, last)):
        held = sum(parameter.numel() * 4 for parameter in stage.parameters())
        assert parameter_bytes(manifest, index) == held
    whole = sum(parameter.numel() * 4 for parameter in build_uncut(manifest, CPU).parameters())
    assert parameter_bytes(manifest, 0) + parameter_bytes(manifest, 1) == whole


def test_memory_of_a_huge_stage_is_known_without_having_it() -> None:
    huge = {
        **LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 65536,
        "num_hidden_layers": 2,
        "head_dim": 128,
    }
    assert parameter_bytes(make_manifest(huge, (0, 1, 2)), 1) > 10 * 2**30


def test_tied_embeddings_need_one_stage(tokens: Tensor) -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    with pytest.raises(UserError, match=r'"tie_word_embeddings": false'):
        build_stage(make_manifest(tied, (0, 2, 4)), 0, CPU)
    whole = build_stage(make_manifest(tied, (0, 4)), 0, CPU)
    head = whole.causal_lm.get_parameter("lm_head.weight")
    assert head is whole.causal_lm.get_parameter("model.embed_tokens.weight")
    assert whole.loss(tokens[:, :-1], tokens[:, 1:]).isfinite()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**SHAPE, "model_type": "no-such-model"}, "cannot build a causal LM"),
        ({**SHAPE, "model_type": "bert"}, "cannot be cut|cannot build"),
        ({**SHAPE, "model_type": "gpt2"}, "cannot be cut into stages: it has no model.layers"),
        (
            {**LLAMA, "model_type": "granite", "embedding_multiplier": 12.0},
            "changes hidden states outside its layers",
        ),
        ({**LLAMA, "num_attention_heads": 0}, "cannot build a causal LM"),
        ({**LLAMA, "hidden_act": "no-such-function"}, "cannot build a causal LM"),
    ],
)
def test_a_model_that_cannot_be_cut_is_a_user_error(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_stage(make_manifest(config, (0, 2, 4)), 1, CPU)
