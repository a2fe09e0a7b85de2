"""Cutting one pipeline stage out of any Hugging Face decoder.

The whole model is built on the meta device (no memory), what other stages hold is dropped, and the rest is
materialised. Initial weights depend only on the manifest's seed and on the place of a tensor in the *whole* model, so
replicas of a stage agree without talking, and every cut of a model has the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import RLock
from typing import Any, cast

import torch
from blake3 import blake3
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from protocol.errors import UserError
from protocol.manifest import Manifest, ModelSection

_SEED_DOMAIN = b"sentinel/weights/1"
_FITTING = "Choose a decoder of the Llama family (llama, qwen2, qwen3, mistral, olmo2, ...)"


class StageModule(nn.Module):
    """The decoder layers of one stage, with the embedding on the first stage and norm + LM head on the last.

    B is the number of sequences, T of tokens, W the model's width, V its vocabulary.
    """

    def __init__(self, causal_lm: nn.Module, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.is_first = is_first
        self.is_last = is_last
        # Evaluation mode turns dropout off: a stage must be a function of its input, or nobody could check its output.
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) on the first stage, hidden (B, T, W) on others, to hidden or, on the last, logits (B, T, V)."""
        inputs = {"input_ids": x} if self.is_first else {"inputs_embeds": x}
        if self.is_last:
            return cast(Tensor, self.causal_lm(**inputs, use_cache=False).logits)
        base = cast(nn.Module, self.causal_lm.model)
        return cast(Tensor, base(**inputs, use_cache=False).last_hidden_state)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy in nats per token on the last stage. `labels` are int64 (B, T), already shifted."""
        logits = self(x)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


# transformers and torch change process-wide state while they build a model, and a process may hold several nodes.
_BUILDING = RLock()


def build_stage(manifest: Manifest, stage: int, device: torch.device) -> StageModule:
    """Stage `stage` of the manifest's model in fp32 on `device`, with its initial weights.

    Raises `UserError` if the model cannot be cut.
    """
    low, high = manifest.stages.cut[stage], manifest.stages.cut[stage + 1]
    with _BUILDING:
        return _build(manifest, low, high, device)


def build_uncut(manifest: Manifest, device: torch.device) -> StageModule:
    """The whole model as one stage that is first and last, with exactly the weights that the stages have."""
    with _BUILDING:
        return _build(manifest, 0, manifest.model.layers, device)


def parameter_bytes(manifest: Manifest, stage: int) -> int:
    """Bytes of the stage's fp32 weights, found without allocating them. Training needs about five times as much."""
    with _BUILDING:
        causal_lm = meta_model(manifest.model)
    _prune(causal_lm, manifest.stages.cut[stage], manifest.stages.cut[stage + 1])
    return sum(parameter.numel() * 4 for parameter in causal_lm.parameters())


def meta_model(model: ModelSection) -> Any:
    """The uncut Hugging Face model on the meta device: shapes and no memory. Raises `UserError` if it does not fit."""
    config = {key: value for key, value in model.config.items() if key not in ("dtype", "torch_dtype")}
    try:
        # `fork_rng` because building may draw from the global generator, which belongs to the caller.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            causal_lm: Any = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config), attn_implementation="sdpa", dtype=torch.float32
            )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ImportError,
        ZeroDivisionError,
        RuntimeError,
    ) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"transformers cannot build a causal LM from model.config: {detail[:200]}"
        raise UserError(problem, "Mend the config, or update transformers") from None
    _check_architecture(causal_lm)
    return causal_lm


def check_untied(causal_lm: Any, stages: int) -> None:
    """Raises `UserError` if one weight would have to be on two stages."""
    if causal_lm.config.tie_word_embeddings and stages > 1:
        problem = "The model ties its input and output embeddings, which are on different stages"
        raise UserError(problem, 'Set "tie_word_embeddings": false in the model config, or use one stage')


def _check_architecture(causal_lm: Any) -> None:
    base = getattr(causal_lm, "model", None)
    parts = ("layers", "embed_tokens", "norm", "rotary_emb")
    missing = [f"model.{part}" for part in parts if not hasattr(base, part)]
    if not hasattr(causal_lm, "lm_head"):
        missing.append("lm_head")
    if missing:
        problem = f"{type(causal_lm).__name__} cannot be cut into stages: it has no {', '.join(missing)}"
        raise UserError(problem, _FITTING)


def _build(manifest: Manifest, low: int, high: int, device: torch.device) -> StageModule:
    causal_lm = meta_model(manifest.model)
    check_untied(causal_lm, manifest.stages.count)
    _prune(causal_lm, low, high)
    _materialise(causal_lm, manifest.seed, low)
    _localise_config(causal_lm.config, low, high)
    _check_passes_hidden_states(causal_lm)
    stage = StageModule(causal_lm, is_first=low == 0, is_last=high == manifest.model.layers)
    return stage.to(device)


def _prune(causal_lm: Any, low: int, high: int) -> None:
    """Keep decoder layers low..high-1, the embedding if low is 0, and norm + LM head if high is the last."""
    base = causal_lm.model
    count = len(base.layers)
    base.layers = nn.ModuleList(list(base.layers)[low:high])
    if low > 0:
        base.embed_tokens = None
    if high < count:
        base.norm = nn.Identity()
        causal_lm.lm_head = None


def _named_groups(causal_lm: Any, low: int) -> Iterator[tuple[str, nn.Module]]:
    """The stage's parts under the names they have in the whole model: the unit of weight initialisation."""
    base = causal_lm.model
    for index, layer in enumerate(base.layers):
        yield f"layer/{low + index}", layer
    for name, module in base.named_children():
        if name != "layers":
            yield name, module
    if causal_lm.lm_head is not None:
        yield "lm_head", causal_lm.lm_head


def _materialise(causal_lm: Any, seed: int, low: int) -> None:
    """Allocate on the CPU and initialise with the architecture's own `_init_weights`, one seed per named group.

    Always on the CPU, whose generator is the same everywhere; the global generator is left as it was.
    """
    causal_lm.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in causal_lm.parameters():
            parameter.fill_(float("nan"))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, group in _named_groups(causal_lm, low):
            key = _SEED_DOMAIN + seed.to_bytes(8, "little") + name.encode()
            torch.default_generator.manual_seed(int.from_bytes(blake3(key).digest(length=8), "little"))
            for module in group.modules():
                causal_lm._init_weights(module)
    # Not a parameter, so not in every architecture's `_init_weights`; a pure function of the config.
    causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(causal_lm.config)
    if causal_lm.config.tie_word_embeddings:
        causal_lm.tie_weights()
    for name, parameter in causal_lm.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"{type(causal_lm).__name__} does not say how to initialise {name}", _FITTING)


def _localise_config(config: Any, low: int, high: int) -> None:
    """The stage's forward pass looks up each layer's kind (say sliding attention) by its position *in the stage*."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(kinds)[low:high]
    config.num_hidden_layers = high - low


def _check_passes_hidden_states(causal_lm: Any) -> None:
    """A base model that also scales or shifts its `inputs_embeds` (Granite does) would do so once per stage."""
    base = causal_lm.model
    layers, norm = base.layers, base.norm
    base.layers, base.norm = nn.ModuleList(), nn.Identity()
    probe = torch.linspace(-1, 1, 2 * causal_lm.config.hidden_size).view(1, 2, -1)
    with torch.no_grad():
        passed = base(inputs_embeds=probe, use_cache=False).last_hidden_state
    base.layers, base.norm = layers, norm
    if not torch.equal(passed, probe):
        problem = f"{type(causal_lm).__name__} cannot be cut into stages: it changes hidden states outside its layers"
        raise UserError(problem, _FITTING)
