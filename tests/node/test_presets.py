"""Manifests from presets and configs."""

from __future__ import annotations

from typing import Any

import pytest

from node.model import parameter_bytes
from node.presets import PRESETS, build_manifest, even_cut
from protocol.errors import UserError
from protocol.manifest import Manifest, ModelSection

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def build(**changes: Any) -> Manifest:
    options: dict[str, Any] = {
        "preset": "tiny",
        "config": None,
        "stages": None,
        "data": "builtin:pydoc",
        "tokenizer": "bytes",
        "seed": 1,
        "testbed": True,
        "schedule": "overlapped",
        "rounds": None,
        "min_replicas": 2,
        "wire": "fp32",
        "name": "test",
    }
    return build_manifest(**{**options, **changes})


def test_tiny_is_cut_evenly() -> None:
    assert build().stages.cut == (0, 2, 4, 6)
    assert build(stages=2).stages.cut == (0, 3, 6)
    assert build(stages=6).stages.cut == tuple(range(7))
    assert build(stages=1).stages.cut == (0, 6)


def test_options_reach_the_manifest() -> None:
    manifest = build(rounds=9, schedule="synchronous", wire="bf16", seed=7)
    assert (manifest.schedule.rounds, manifest.schedule.kind, manifest.schedule.min_replicas) == (
        9,
        "synchronous",
        2,
    )
    assert (manifest.wire, manifest.seed, manifest.testbed, manifest.name) == ("bf16", 7, True, "test")
    assert manifest.optimizer.warmup_rounds < 9


def test_llama_600m_is_the_papers_size() -> None:
    manifest = build(preset="llama-600m")
    assert manifest.stages.cut == tuple(range(17))
    weights = sum(parameter_bytes(manifest, stage) for stage in range(16)) // 4
    assert 0.55e9 < weights < 0.65e9
    assert manifest.model.vocabulary == 128256 and manifest.batch.context == 1024


def test_a_heavy_head_gets_fewer_layers() -> None:
    model = ModelSection(config={**CONFIG, "tie_word_embeddings": False})
    cut = even_cut(model, 3, context=128)
    assert cut[3] - cut[2] < cut[1] - cut[0], "the last stage also has the LM head"
    assert len(cut) == 4 and cut[0] == 0 and cut[3] == 8


def test_any_config_gets_defaults_by_its_size() -> None:
    small, large = (
        build(preset=None, config=CONFIG),
        build(preset=None, config={**CONFIG, "hidden_size": 512}),
    )
    assert small.optimizer.lr >= large.optimizer.lr
    assert small.batch.context <= 512 and small.model.config["tie_word_embeddings"] is False
    for manifest in (small, large):
        assert manifest.batch.microbatches >= 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preset": "huge"}, "There is no preset huge.*tiny"),
        ({"preset": None}, "needs a preset or a model config"),
        ({"config": CONFIG}, "not both"),
        ({"stages": 7}, "6 layers cannot be cut into 7 stages"),
        ({"stages": 0}, "cannot be cut into 0 stages"),
        ({"rounds": 0}, "rounds"),
        ({"schedule": "sometimes"}, "schedule.kind"),
        ({"wire": "fp7"}, "wire"),
        ({"name": "a/b"}, "name"),
        ({"preset": None, "config": {"model_type": "llama"}}, "lacks `num_hidden_layers`"),
        ({"preset": None, "config": {**CONFIG, "model_type": "nothing"}}, "cannot build a causal LM"),
        ({"preset": None, "config": {**CONFIG, "tie_word_embeddings": True}}, "ties its input and output"),
    ],
)
def test_what_makes_no_run_is_a_user_error(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(**changes)


def test_presets_are_valid() -> None:
    for preset in PRESETS:
        assert build(preset=preset).canonical()
