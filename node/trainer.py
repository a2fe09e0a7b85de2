"""A stage's weights, gradients, optimizer, versions and state. Used from one compute thread; knows no network.

Tensors that enter and leave are on the host; the trainer moves them to its device and back.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from weakref import WeakSet

import torch
from blake3 import blake3
from torch import Tensor, nn

from node.model import build_stage
from protocol.manifest import Manifest, OptimizerSection

_HEADER_BYTES = 16
_NORM_BLOCK = 4096
_NORM_BLOCKS_AT_ONCE = 64
_PARALLEL_HASH_BYTES = 1 << 20


class Pass:
    """One microbatch's way forward through the stage: its output, and the graph until it is released."""

    def __init__(self, x: Tensor, output: Tensor, leaves: Sequence[Tensor], version: int) -> None:
        self.version = version
        self.state = b""
        self.labels = memoryview(b"")
        """As they go on with the output."""
        self.output = _to_host(output.detach())
        self._x: Tensor | None = x
        self._graph: Tensor | None = output
        self._leaves = leaves

    @property
    def inputs(self) -> Tensor:
        """What the pass was made of, on the trainer's device. Raises `ValueError` for a pass that was released."""
        if self._x is None:
            raise ValueError("the pass was released")
        return self._x

    def release(self) -> None:
        """Drop the graph, and with it the weights it was made with. Harmless to repeat."""
        self._x = self._graph = None
        self._leaves = ()


class StageTrainer:
    """Trains one stage. `version` counts rounds; every replica with the same version must hold the same weights.

    The weights are one flat fp32 vector, of which the module's parameters are views: first the tensors that decay
    (two dimensions or more), then the rest. A graph needs the very weights it was made with, so while one is alive a
    step writes into a new vector and binds the module to that; the old vector dies with its last graph.
    """

    def __init__(self, manifest: Manifest, stage: int, device: torch.device) -> None:
        self.stage = stage
        self.version = 0
        self.accumulated = 0
        self.memory = 0
        """How many earlier versions' weights are kept, so that work done with them can be done again."""
        self.memory_seconds = math.inf
        """For how long, but for the last of them."""
        self._past: OrderedDict[int, tuple[Tensor, float]] = OrderedDict()
        """And when a step went past them."""
        self.module = build_stage(manifest, stage, device)
        self._device = device
        self._optimizer_section = manifest.optimizer
        self._rounds = manifest.schedule.rounds
        self._clip = manifest.optimizer.clip / math.sqrt(manifest.stages.count)
        self._live: WeakSet[Pass] = WeakSet()
        self._exported = False
        self._steps = 0
        self._slots, self._shapes, self._decayed = _layout(self.module)
        parameters = [getattr(*places[0]).detach() for places in self._slots]
        self._weights = torch.cat([parameter.flatten() for parameter in parameters])
        self._first_moment = torch.zeros_like(self._weights)
        self._second_moment = torch.zeros_like(self._weights)
        self._reset_accumulator()
        self._bind()

    @property
    def size(self) -> int:
        """Number of weights of the stage."""
        return self._weights.numel()

    # Passes

    def forward(self, x: Tensor) -> Pass:
        """Run the stage on int64 tokens (B, T) or hidden (B, T, W), keeping the graph until the pass is released."""
        inputs = self._inputs(x)
        with self._autocast():
            output = self.module(inputs)
        taken = Pass(inputs, output, self._leaves, self.version)
        self._live.add(taken)
        return taken

    def backward(self, taken: Pass, grad_output: Tensor, *, accumulate: bool) -> Tensor | None:
        """Gradient (B, T, W) of the stage's input given that of its output, None on the first stage. Releases the pass.

        With `accumulate` the gradient of the weights, *as they were in the forward pass*, goes to the accumulator.
        Raises `ValueError` for a pass that was released.
        """
        if taken._graph is None or taken._x is None:
            raise ValueError("the pass was released")
        grad = grad_output.to(self._device, taken._graph.dtype, non_blocking=True)
        try:
            return self._differentiate(taken._graph, grad, taken._x, taken._leaves, accumulate=accumulate)
        finally:
            taken.release()
            self._live.discard(taken)

    def loss_backward(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        accumulate: bool,
        check: Callable[[float], None] = lambda loss: None,
    ) -> tuple[float, Tensor | None]:
        """Last stage: mean loss (nats per token) of int64 `labels` (B, T), and the gradient of the stage's input.

        Raises `ValueError`, and accumulates nothing, if the loss is not finite; and what `check` raises at the loss.
        """
        inputs = self._inputs(x)
        with self._autocast():
            loss = self.module.loss(inputs, labels.to(self._device, non_blocking=True))
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError("the loss is not finite")
        check(value)
        return value, self._differentiate(loss, None, inputs, self._leaves, accumulate=accumulate)

    @property
    def oldest(self) -> int:
        """The earliest version whose weights are kept."""
        return next(iter(self._past), self.version)

    def redo(
        self, version: int, x: Tensor, grad_output: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """What a pass with the weights of `version` gives: the output; with a gradient or labels, that of the input.

        Shapes as in `forward` and `loss_backward`, the latter's loss a mean over what is given. Accumulates nothing.
        Raises `ValueError` for a version whose weights are not kept.
        """
        if version == self.version:
            return self._redo(x, grad_output, labels)
        if version not in self._past:
            raise ValueError(f"the weights of version {version} are not kept")
        self._place([nn.Parameter(view, requires_grad=False) for view in self._views(self._past[version][0])])
        try:
            return self._redo(x, grad_output, labels)
        finally:
            self._place(self._leaves)

    def _redo(self, x: Tensor, grad_output: Tensor | None, labels: Tensor | None) -> Tensor:
        inputs = self._inputs(x)
        goes_back = labels is not None or grad_output is not None
        # Whatever the caller's setting: attacks are carried out without gradients.
        with torch.set_grad_enabled(goes_back), self._autocast():
            made = (
                self.module(inputs) if labels is None else self.module.loss(inputs, labels.to(self._device))
            )
        if not goes_back:
            return _to_host(made)
        grad = None if grad_output is None else grad_output.to(self._device, made.dtype)
        (answer,) = torch.autograd.grad(made, [inputs], grad)
        return _to_host(answer)

    def _inputs(self, x: Tensor) -> Tensor:
        if self.module.is_first:
            return x.to(self._device, non_blocking=True)
        return x.detach().to(self._device, torch.float32, non_blocking=True).requires_grad_()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")

    def _differentiate(
        self, output: Tensor, grad: Tensor | None, x: Tensor, leaves: Sequence[Tensor], *, accumulate: bool
    ) -> Tensor | None:
        wanted = [] if self.module.is_first else [x]
        if accumulate:
            wanted = [*wanted, *leaves]
        if not wanted:
            return None
        # An expert that got no token has no gradient: that is a zero.
        gradients = list(torch.autograd.grad(output, wanted, grad, allow_unused=True))
        grad_x = None if self.module.is_first else gradients.pop(0)
        if accumulate:
            pairs = [
                (view, one)
                for view, one in zip(self._gradient_views, gradients, strict=True)
                if one is not None
            ]
            torch._foreach_add_([view for view, _ in pairs], [one for _, one in pairs])
            self.accumulated += 1
        return None if grad_x is None else _to_host(grad_x)

    # Gradients and steps

    def take_gradient(self) -> tuple[Tensor, int]:
        """The sum over microbatches of their mean-loss gradients, flat fp32 on the host, and their number. Starts anew.

        Passes still in flight add to the new sum.
        """
        taken = self._gradient, self.accumulated
        self._reset_accumulator()
        return _to_host(taken[0]), taken[1]

    def step(self, mean_gradient: Tensor) -> None:
        """One optimizer step with the round's mean gradient (flat fp32, `size`), to the next version.

        Raises `ValueError`, and changes nothing, for a gradient of another shape or dtype or with a value not finite.
        """
        if mean_gradient.shape != self._weights.shape or mean_gradient.dtype != torch.float32:
            raise ValueError(f"the gradient is not a flat fp32 vector of {self.size}")
        gradient = mean_gradient.detach().to(self._device)
        norm = flat_norm(gradient)
        if not math.isfinite(norm):
            raise ValueError("the mean gradient is not finite")
        if self._clip and norm > self._clip:
            gradient = gradient * (self._clip / norm)
        self._remember()
        self._unshare()
        self._adamw(gradient)
        self._steps += 1
        self.version += 1

    def skip(self) -> None:
        """To the next version with the same weights: a round in which nobody had a gradient."""
        self._remember()
        self.version += 1

    def _remember(self) -> None:
        """Keep this version's weights, if `memory` says so: the next step then writes into a copy."""
        now = monotonic()
        if self.memory:
            self._past[self.version] = self._weights, now
        too_old = [version for version, (_, at) in self._past.items() if now - at > self.memory_seconds]
        for version in (*self._past,)[: max(len(too_old), len(self._past) - self.memory)]:
            del self._past[version]

    def _adamw(self, gradient: Tensor) -> None:
        """`torch.optim.AdamW` on the flat vectors, in place."""
        section = self._optimizer_section
        groups, state = [], {}
        for part, decay in (
            (slice(0, self._decayed), section.weight_decay),
            (slice(self._decayed, None), 0.0),
        ):
            weights = self._weights[part]
            if not weights.numel():
                continue
            weights.grad = gradient[part]
            groups.append({"params": [weights], "weight_decay": decay})
            state[weights] = {
                "step": torch.tensor(float(self._steps), device=self._device),
                "exp_avg": self._first_moment[part],
                "exp_avg_sq": self._second_moment[part],
            }
        rate = learning_rate(section, self._rounds, self.version)
        optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=(section.beta1, section.beta2), eps=section.epsilon, fused=True
        )
        optimizer.state.update(state)
        optimizer.step()

    def _unshare(self) -> None:
        """Before weights or moments are written: leave what live graphs and exported state still read."""
        if self._exported:
            self._first_moment = self._first_moment.clone()
            self._second_moment = self._second_moment.clone()
        if self._exported or self.memory or any(taken._graph is not None for taken in self._live):
            self._weights = self._weights.clone()
            self._bind()
        self._exported = False

    def _bind(self) -> None:
        """Make the module's parameters views of the flat weights."""
        self._leaves = tuple(nn.Parameter(view) for view in self._views(self._weights))
        self._place(self._leaves)

    def _place(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put these in the places of the module's own; what `setattr` would check costs more than all the rest."""
        for places, parameter in zip(self._slots, parameters, strict=True):
            for owner, name in places:
                owner._parameters[name] = parameter

    def _reset_accumulator(self) -> None:
        self._gradient = torch.zeros_like(self._weights)
        self._gradient_views = self._views(self._gradient)
        self.accumulated = 0

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    # State

    def state_bytes(self) -> int:
        """Size of the full state: a header, the weights and AdamW's two moments."""
        return _HEADER_BYTES + 3 * 4 * self.size

    def state_chunks(self, chunk_bytes: int) -> list[memoryview]:
        """The full state as little-endian bytes, in a fixed order, in chunks of at most `chunk_bytes`.

        Version and step count (uint64 each), weights, first moments, second moments (fp32 each). A chunk never spans
        two of these. The chunks are a snapshot: a later step does not change them.
        """
        self._exported = True
        return self._chunks(chunk_bytes)

    def chunk_digests(self, chunk_bytes: int) -> list[bytes]:
        """BLAKE3 of each of `state_chunks(chunk_bytes)`, to check chunks one by one."""
        return [chunk_digest(chunk) for chunk in self._chunks(chunk_bytes)]

    def digest(self, chunk_bytes: int) -> bytes:
        """One digest of the full state, version included: `state_digest(chunk_digests(chunk_bytes))`."""
        return state_digest(self.chunk_digests(chunk_bytes))

    def load_state(self, version: int, chunks: Iterable[bytes | memoryview]) -> None:
        """Take over a state of the given version; where the chunks were cut does not matter.

        Raises `ValueError`, and changes nothing, if size or version differ or a value cannot be. Gradients accumulated
        so far belong to other weights and are dropped; passes in flight keep theirs.
        """
        header = bytearray(_HEADER_BYTES)
        vectors = [torch.empty(self.size) for _ in range(3)]
        _fill([memoryview(header), *map(_bytes_of, vectors)], chunks)
        held, steps = int.from_bytes(header[:8], "little"), int.from_bytes(header[8:], "little")
        if held != version or steps > held:
            raise ValueError(f"the state is of version {held} with {steps} steps, not of version {version}")
        if not all(bool(vector.isfinite().all()) for vector in vectors) or bool((vectors[2] < 0).any()):
            raise ValueError("the state holds impossible values")
        self._weights, self._first_moment, self._second_moment = (
            vector.to(self._device) for vector in vectors
        )
        self.version, self._steps, self._exported = version, steps, False
        self._past.clear()
        self._reset_accumulator()
        self._bind()

    def _chunks(self, chunk_bytes: int) -> list[memoryview]:
        header = self.version.to_bytes(8, "little") + self._steps.to_bytes(8, "little")
        vectors = (self._weights, self._first_moment, self._second_moment)
        parts = [memoryview(header), *(_bytes_of(_to_host(vector)) for vector in vectors)]
        return [part[at : at + chunk_bytes] for part in parts for at in range(0, len(part), chunk_bytes)]


def learning_rate(section: OptimizerSection, rounds: int, version: int) -> float:
    """Of the step that leads away from `version`: linear warm-up, then a cosine that ends at round `rounds`."""
    if version < section.warmup_rounds:
        return section.lr * (version + 1) / section.warmup_rounds
    progress = min(1.0, (version - section.warmup_rounds) / max(1, rounds - section.warmup_rounds))
    fraction = section.final_lr_fraction
    return section.lr * (fraction + (1 - fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def flat_norm(flat: Tensor) -> float:
    """L2 norm of a flat vector, the same bits whatever the number of threads: blocks of fixed size, summed exactly."""
    whole = flat.numel() - flat.numel() % _NORM_BLOCK
    squares: list[float] = []
    if whole:
        # A few blocks at a time: their doubles stay in the cache, and no copy of the whole is made.
        for part in torch.split(flat[:whole].view(-1, _NORM_BLOCK), _NORM_BLOCKS_AT_ONCE):
            squares += part.double().square_().sum(1).tolist()
    squares += flat[whole:].double().square().tolist()
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """BLAKE3 of one chunk of state, on as many threads as torch may use where that pays.

    Not on more: threads that have nothing to hash yield the processor in a loop, tens of times for each state.
    """
    threads = torch.get_num_threads() if len(chunk) >= _PARALLEL_HASH_BYTES else 1
    return blake3(chunk, max_threads=threads).digest()


def state_digest(chunk_digests: Sequence[bytes]) -> bytes:
    """The digest of a state from those of its chunks. The first chunk holds the version."""
    return blake3(b"".join(chunk_digests)).digest()


def _layout(module: nn.Module) -> tuple[list[list[tuple[nn.Module, str]]], list[torch.Size], int]:
    """Where each tensor of the flat vector lives (tied ones in several places), its shape, and how many decay."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((owner, name))
    ordered = sorted(places, key=lambda parameter: parameter.dim() < 2)
    decayed = sum(parameter.numel() for parameter in ordered if parameter.dim() >= 2)
    return [places[parameter] for parameter in ordered], [parameter.shape for parameter in ordered], decayed


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor itself on the CPU; else a copy in pinned memory, which the device fills at full speed."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor)


def _bytes_of(vector: Tensor) -> memoryview:
    """A flat fp32 host tensor's memory, not copied."""
    if sys.byteorder != "little":
        raise RuntimeError("state is exchanged as little-endian bytes; this machine is big-endian")
    return vector.numpy().data.cast("B")


def _fill(targets: list[memoryview], chunks: Iterable[bytes | memoryview]) -> None:
    """Write the chunks, end to end, into the targets. Raises `ValueError` unless they fill them exactly."""
    position = 0
    total = sum(map(len, targets))
    starts = [sum(map(len, targets[:index])) for index in range(len(targets))]
    for chunk in chunks:
        data = memoryview(chunk).cast("B")
        if position + len(data) > total:
            raise ValueError(f"the state is longer than {total} bytes")
        for start, target in zip(starts, targets, strict=True):
            low, high = max(position, start), min(position + len(data), start + len(target))
            if low < high:
                target[low - start : high - start] = data[low - position : high - position]
        position += len(data)
    if position != total:
        raise ValueError(f"the state has {position} bytes, not {total}")
