"""One stage of the mesh: all its replicas at once, since they share weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from node.model import build_stage
from node.trainer import learning_rate
from protocol.manifest import Manifest

Weights = dict[str, Tensor]


class MeshStage:
    """Runs M microbatches of all replicas as one batch, and redoes single ones, on these or on older weights.

    Microbatch tensors are (M, B, T, W), or int64 tokens (M, B, T) into the first stage.
    """

    def __init__(self, manifest: Manifest, index: int, weight_memory: int) -> None:
        self.index = index
        self.module = build_stage(manifest, index, torch.device("cpu"))
        self.parameters = list(self.module.parameters())
        self._older: deque[Weights] = deque(maxlen=weight_memory + 1)
        self._received: Tensor | None = None
        self._gradient_received: Tensor | None = None
        self._graph: tuple[Tensor, Tensor] | None = None
        self._gradients: Sequence[Tensor | None] = ()
        self._contributions = 0

    def begin_round(self) -> None:
        """Remember this version's weights, if anybody attacks with old ones."""
        self._gradients, self._contributions, self._graph = (), 0, None
        if self._older.maxlen != 1:
            named = self.module.named_parameters()
            self._older.append({name: weight.detach().clone() for name, weight in named})

    def forward(self, received: Tensor) -> Tensor:
        """Honest outputs (M, B, T, W) for what arrived."""
        self._received = received
        x = received.flatten(0, 1)
        if not self.module.is_first:
            x = x.detach().requires_grad_()
        output: Tensor = self.module(x)
        self._graph = x, output
        return output.detach().view(*received.shape[:2], *output.shape[1:])

    def backward(self, gradient: Tensor, active: Tensor) -> Tensor | None:
        """Honest input gradients for output gradients (M, B, T, W), of which only `active` (M,) bool count."""
        if self._graph is None:
            raise RuntimeError("backward before forward")
        x, output = self._graph
        self._gradient_received = gradient
        grad = self._differentiate(output, x, gradient.flatten(0, 1))
        self._contributions = int(active.sum())
        self._graph = None
        return None if grad is None else grad.view(gradient.shape)

    def loss_backward(self, received: Tensor, labels: Tensor, active: Tensor) -> Tensor:
        """Last stage: the gradient (M, B, T, W) of each active microbatch's own mean loss.

        Raises `ValueError` if the loss is not finite.
        """
        self._received = received
        self._labels = labels
        counted = torch.where(active[:, None, None], labels, -100)
        x = received.flatten(0, 1).detach().requires_grad_()
        loss = self.module.loss(x, counted.flatten(0, 1))
        if not bool(loss.isfinite()):
            raise ValueError("the loss is not finite")
        grad = self._differentiate(loss, x, None)
        self._contributions = 1  # The mean over microbatches is already taken.
        if grad is None:
            raise RuntimeError("a mesh has more than one stage")
        return grad.view(received.shape) * int(active.sum())

    def _differentiate(self, output: Tensor, x: Tensor, gradient: Tensor | None) -> Tensor | None:
        """The gradient of x; those of the weights are kept for the round's step."""
        wanted = self.parameters if self.module.is_first else [x, *self.parameters]
        gradients = list(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        grad_x = None if self.module.is_first else gradients.pop(0)
        self._gradients = gradients
        return grad_x

    def settle(self, clip: float) -> None:
        """Give the weights their round's gradient: the mean over the microbatches that contributed, its norm clipped.

        None if nobody contributed, or if it is not finite: then the optimizer leaves this stage alone.
        """
        known = [one for one in self._gradients if one is not None]
        norm = torch.stack(torch._foreach_norm(known)).norm() / self._contributions if known else torch.inf
        usable = self._contributions > 0 and math.isfinite(norm)
        scale = min(1.0, clip / max(float(norm), 1e-30)) / self._contributions if usable else 0.0
        if usable:
            torch._foreach_mul_(known, scale)
        for weight, gradient in zip(
            self.parameters, self._gradients or [None] * len(self.parameters), strict=True
        ):
            weight.grad = gradient if usable else None

    def redo_activation(self, microbatch: int, versions: int = 0) -> Tensor:
        """Output (B, T, W) of one microbatch, computed again on the weights of `versions` ago."""
        if self._received is None:
            raise RuntimeError("redo before forward")
        with torch.no_grad():
            return self._run(self._received[microbatch], versions)

    def redo_gradient(self, microbatch: int, versions: int = 0) -> Tensor:
        """Input gradient (B, T, W) of one microbatch, computed again on the weights of `versions` ago."""
        if self._received is None:
            raise RuntimeError("redo before forward")
        x = self._received[microbatch].clone().requires_grad_()
        with torch.enable_grad():
            output = self._run(x, versions)
            if self.module.is_last:
                labels = self._labels[microbatch].flatten()
                loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), labels)
                return torch.autograd.grad(loss, x)[0]
            if self._gradient_received is None:
                raise RuntimeError("redo before backward")
            return torch.autograd.grad(output, x, self._gradient_received[microbatch])[0]

    def _run(self, x: Tensor, versions: int) -> Tensor:
        if versions == 0:
            output: Tensor = self.module(x)
            return output
        oldest_first = max(0, len(self._older) - 1 - versions)
        older: Tensor = functional_call(self.module, self._older[oldest_first], (x,))
        return older


class MeshOptimizer:
    """AdamW for all stages at once, as a node's trainer has it: its schedule, its decay, clipping stage by stage."""

    def __init__(self, manifest: Manifest, stages: list[MeshStage]) -> None:
        section = manifest.optimizer
        self._section = section
        self._stages = stages
        self._rounds = manifest.schedule.rounds
        self._clip = section.clip / math.sqrt(manifest.stages.count) or math.inf
        weights = [weight for stage in stages for weight in stage.parameters]
        decayed = [weight for weight in weights if weight.dim() >= 2]
        rest = [weight for weight in weights if weight.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": section.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.epsilon,
            fused=True,
        )

    def step(self, round: int) -> None:
        for stage in self._stages:
            stage.settle(self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._section, self._rounds, round)
        self._optimizer.step()
