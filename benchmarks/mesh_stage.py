"""One stage of the mesh: all its replicas at once, since they share weights."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.func import functional_call

from node.trainer import Pass, StageTrainer
from protocol.manifest import Manifest

Weights = dict[str, Tensor]


class MeshStage:
    """Runs M microbatches of all replicas as one batch, and redoes single ones, on these or on older weights.

    Microbatch tensors are (M, B, T, W), or int64 tokens (M, B, T) into the first stage.
    """

    def __init__(self, manifest: Manifest, index: int, weight_memory: int) -> None:
        self.index = index
        self.trainer = StageTrainer(manifest, index, torch.device("cpu"))
        self._older: deque[Weights] = deque(maxlen=weight_memory + 1)
        self._taken: Pass | None = None
        self._received: Tensor | None = None
        self._gradient_received: Tensor | None = None
        self._contributions = 0

    def begin_round(self) -> None:
        """Remember this version's weights, if anybody attacks with old ones."""
        if self._older.maxlen != 1:
            named = self.trainer.module.named_parameters()
            self._older.append({name: weight.detach().clone() for name, weight in named})

    def forward(self, received: Tensor) -> Tensor:
        """Honest outputs (M, B, T, W) for what arrived."""
        self._received = received
        self._taken = self.trainer.forward(received.flatten(0, 1))
        return self._taken.output.view(*received.shape[:2], *self._taken.output.shape[1:])

    def backward(self, gradient: Tensor, active: Tensor) -> Tensor | None:
        """Honest input gradients for output gradients (M, B, T, W), of which only `active` (M,) bool count."""
        if self._taken is None:
            raise RuntimeError("backward before forward")
        self._gradient_received = gradient
        self._contributions = int(active.sum())
        grad = self.trainer.backward(self._taken, gradient.flatten(0, 1), accumulate=True)
        self._taken = None
        return None if grad is None else grad.view(gradient.shape)

    def loss_backward(self, received: Tensor, labels: Tensor, active: Tensor) -> Tensor:
        """Last stage: the gradient (M, B, T, W) of each active microbatch's own mean loss.

        Raises `ValueError` if the loss is not finite.
        """
        self._received = received
        self._labels = labels
        self._contributions = 1  # The mean over microbatches is already taken.
        counted = torch.where(active[:, None, None], labels, -100)
        _, grad = self.trainer.loss_backward(received.flatten(0, 1), counted.flatten(0, 1), accumulate=True)
        if grad is None:
            raise RuntimeError("a mesh has more than one stage")
        return grad.view(received.shape) * int(active.sum())

    def step(self) -> None:
        """The optimizer step with the mean over the microbatches that contributed; none if none did."""
        gradient, _ = self.trainer.take_gradient()
        if self._contributions and bool(gradient.isfinite().all()):
            self.trainer.step(gradient / self._contributions)
        else:
            self.trainer.skip()
        self._contributions = 0
        self._taken = None

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
            if self.trainer.module.is_last:
                labels = self._labels[microbatch].flatten()
                loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), labels)
                return torch.autograd.grad(loss, x)[0]
            if self._gradient_received is None:
                raise RuntimeError("redo before backward")
            return torch.autograd.grad(output, x, self._gradient_received[microbatch])[0]

    def _run(self, x: Tensor, versions: int) -> Tensor:
        module = self.trainer.module
        if versions == 0:
            output: Tensor = module(x)
            return output
        oldest_first = max(0, len(self._older) - 1 - versions)
        older: Tensor = functional_call(module, self._older[oldest_first], (x,))
        return older
