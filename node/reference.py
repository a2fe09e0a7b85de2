"""The uncut model trained in one process on the same samples: what a run of any cut must agree with.

Written apart from the trainer on purpose: one optimizer over ordinary parameters, no flat vectors and no versions.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor, nn

from node.data import open_corpus
from node.model import StageModule, build_uncut
from node.trainer import learning_rate
from protocol.manifest import Manifest


def train_uncut(manifest: Manifest, rounds: int, device: str = "cpu") -> list[float]:
    """Mean loss (nats per token) of each round, before that round's step.

    Round r trains on the slots r*M .. r*M + M-1, where M is the manifest's microbatches per round.
    """
    corpus = open_corpus(manifest)
    place = torch.device(device)
    model = build_uncut(manifest, place)
    stages = _parameters_by_stage(manifest, model)
    optimizer = _optimizer(manifest, model)
    losses = []
    for round_ in range(rounds):
        optimizer.zero_grad()
        first = round_ * manifest.batch.microbatches
        total = 0.0
        for slot in range(first, first + manifest.batch.microbatches):
            samples = corpus.draw(slot).to(place)
            loss = model.loss(samples[:, :-1], samples[:, 1:])
            (loss / manifest.batch.microbatches).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        for parameters in stages:
            _clip(parameters, manifest.optimizer.clip / math.sqrt(manifest.stages.count))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(manifest.optimizer, manifest.schedule.rounds, round_)
        optimizer.step()
        losses.append(total / manifest.batch.microbatches)
    return losses


def _optimizer(manifest: Manifest, model: StageModule) -> torch.optim.AdamW:
    section = manifest.optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": section.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
    )


def _parameters_by_stage(manifest: Manifest, model: StageModule) -> list[list[nn.Parameter]]:
    """The manifest's stages clip their gradients each on its own, so the reference must know what belongs to whom."""
    stages: list[list[nn.Parameter]] = [[] for _ in range(manifest.stages.count)]
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            layer = int(parts[parts.index("layers") + 1])
            stage = bisect_right(manifest.stages.cut, layer) - 1
        else:
            stage = 0 if "embed_tokens" in parts else manifest.stages.count - 1
        stages[stage].append(parameter)
    return stages


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in gradients])).item()
    if limit and norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
