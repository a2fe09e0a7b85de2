"""What the compute thread does with a microbatch: check the bytes, compute, and make the bytes that go on.

Everything here runs on the compute thread, so the slots counted and the gradients summed always agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from time import thread_time

import numpy as np
import torch
from torch import Tensor

from node.flights import Held, Outgoing
from node.sabotage import Redo, Sabotage
from node.trainer import Pass, StageTrainer
from protocol.codec import (
    TensorHeader,
    bytes_of,
    decode_tensor,
    digest,
    encode_tensor,
    payload_digest,
)
from protocol.errors import ProtocolError, Reason
from protocol.manifest import Manifest
from protocol.receipts import Receipt, SignedReceipt
from protocol.samples import STATE_BYTES
from verifier.guard import Guard
from verifier.loss_guard import LossGuard
from verifier.senders import Repeats
from verifier.streams import Direction

_MAX_FLAGGED = 256
_LENIENT_FROM = 6
"""The attempt at a slot from which on the guard lets its tensors pass."""
_TIMED_EVERY = 17
"""Of the guards' checks one in so many is timed. To read a thread's clock is a system call, at which the scheduler may
give the processor to another, and a check that then finds its caches empty costs up to a third more. An odd number,
since kinds of check take turns."""


@dataclass(frozen=True)
class Forwarded:
    """A forward pass: its graph, and the output as it goes out with its labels (None if nothing does)."""

    graph: Pass
    output: Outgoing | None
    input_digest: bytes


@dataclass(frozen=True)
class Returned:
    """A backward pass: the gradient as it goes back (None on the head), and the tail's loss in nats a token."""

    answer: Outgoing | None
    version: int
    loss: float | None = None
    state: bytes = b""


class StagePasses:
    """Around one `StageTrainer`. Shapes: tensors (sequences, context, width), labels (sequences, context)."""

    def __init__(self, manifest: Manifest, trainer: StageTrainer, device: torch.device) -> None:
        self._manifest, self._device = manifest, device
        self.trainer = trainer
        batch = manifest.batch
        self.header = TensorHeader(manifest.wire, (batch.sequences, batch.context, manifest.model.width))
        self.labels_size = batch.sequences * batch.context * 4
        self.slots: list[int] = []
        """Whose gradients the accumulator holds."""
        self.sabotage: Sabotage | None = None
        policy = manifest.verification
        self.guards = (
            {one: Guard(one, np.random.default_rng(), policy.guard) for one in Direction}
            if policy.verifiers
            else {}
        )
        self._repeats = Repeats()
        self._loss_guard = LossGuard() if policy.verifiers and trainer.module.is_last else None
        self.guard_seconds = 0.0
        """CPU time that guards took, by those checks that were timed."""
        self._checks = 0
        self._flagged: OrderedDict[tuple[int, Direction], set[str]] = OrderedDict()
        self._states: OrderedDict[int, bytes] = OrderedDict()

    def note_state(self, digest: bytes) -> None:
        """The weights have changed, and this is now the digest of the full state. On the compute thread."""
        self._states.pop(self.trainer.version, None)
        self._states[self.trainer.version] = digest[:STATE_BYTES]
        while len(self._states) > self.trainer.memory + 1:
            self._states.popitem(last=False)

    def state_of(self, version: int) -> bytes:
        """Which weights a version was; empty if that is not known any more."""
        return self._states.get(version, b"")

    @property
    def payload_size(self) -> int:
        """Bytes of an activation's payload: the tensor and the labels."""
        return self.header.size + self.labels_size

    def inject(self, tokens: Tensor, slot: int) -> Forwarded | Returned:
        """Take a slot's samples, int64 (sequences, context + 1), through the first stage.

        If it is the last one too, all the way.
        """
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.trainer.module.is_last:
            return self._tail(inputs, labels, slot, covered=False)
        own = bytes_of(labels.to(torch.int32))
        return self._forward(inputs, own, digest(bytes_of(inputs.to(torch.int32))), slot)

    def forward(self, received: Held, slot: int) -> Forwarded:
        """Raises `ProtocolError`: not_finite, or flagged by the guard."""
        labels = received.payload[self.header.size :]
        x = self._read(received, Direction.ACTIVATION, labels)
        return self._forward(x, labels, received.digest, slot)

    def tail(self, received: Held, slot: int, *, covered: bool) -> Returned:
        """Forward, loss and backward on the last stage. `covered`: another replica has this slot's gradient.

        Raises `ProtocolError`: as `forward`.
        """
        sent = received.payload[self.header.size :]
        x = self._read(received, Direction.ACTIVATION, sent)
        labels = self._labels(sent, self.header.shape[:2])
        return self._tail(x, labels, slot, covered=covered, receipt=received.receipt)

    def backward(self, graph: Pass, received: Held, slot: int, *, covered: bool) -> Returned:
        """Raises `ProtocolError`: as `forward`, or stale if the weights have moved on too far since then."""
        gradient = self._read(received, Direction.GRADIENT, graph.labels)
        version = self.trainer.version
        if version - graph.version > 1:
            raise ProtocolError(Reason.STALE, f"version {graph.version} at {version}")
        accumulate = not covered and self._counts(slot, graph.version)
        x = graph.inputs if self.sabotage else gradient
        result = self.trainer.backward(graph, gradient, accumulate=accumulate)
        if accumulate:
            self.slots.append(slot)
        if result is None:
            return Returned(None, graph.version)

        def redo(ago: int) -> Tensor:
            return self.trainer.redo(self._before(graph.version, ago), x, gradient)

        return Returned(
            self._send(Direction.GRADIENT, graph.version, slot, gradient, result, redo), graph.version
        )

    @property
    def redo_limit(self) -> int:
        """The most bytes that one sequence's pass can be made of."""
        return 2 * self.header.size // self.header.shape[0]

    def redo(
        self, direction: Direction, version: int, inputs: memoryview, tokens: Tensor | None, sequence: int
    ) -> memoryview:
        """One sequence's pass again, with the weights of `version`: the activation or the gradient, as it would go out;
        a head's activation with its labels.

        `inputs`: see `protocol.samples.Redo`; `tokens` (sequences, context + 1): a head's, for its activation. Raises
        `ProtocolError`: malformed, or expired for a version whose weights are not kept.
        """
        try:
            return self._redo(direction, version, inputs, tokens, sequence)
        except ValueError as error:
            raise ProtocolError(Reason.EXPIRED, str(error)) from None

    def _redo(
        self, direction: Direction, version: int, inputs: memoryview, tokens: Tensor | None, sequence: int
    ) -> memoryview:
        count, *shape = self.header.shape
        header = TensorHeader(self.header.codec, (1, *shape))
        if tokens is not None:
            if sequence >= count:
                raise ProtocolError(Reason.MALFORMED, f"sequence {sequence}")
            made = self.trainer.redo(version, tokens[sequence : sequence + 1, :-1].contiguous())
            labels = bytes_of(tokens[sequence, 1:].to(torch.int32))
            return memoryview(b"".join((encode_tensor(made, self.header.codec), labels)))
        x = decode_tensor(inputs[: header.size], header, self._device)
        more = inputs[header.size :]
        if direction is Direction.ACTIVATION:
            made = self.trainer.redo(version, x)
        elif self.trainer.module.is_last:
            # The loss is a mean over all sequences, of which this is one.
            made = self.trainer.redo(version, x, labels=self._labels(more, (1, shape[0]))) / count
        else:
            made = self.trainer.redo(version, x, decode_tensor(more, header, self._device))
        return encode_tensor(made, self.header.codec)

    def take_gradient(
        self, keep: Callable[[Tensor, tuple[int, ...]], None] = lambda gradient, slots: None
    ) -> None:
        """Hand the flat gradient sum and its slots to `keep`; the accumulator starts anew.

        The slots are forgotten here only after `keep` has them: whoever looks meanwhile must find them somewhere, or
        a head would think them lost and inject them again.
        """
        gradient, count = self.trainer.take_gradient()
        assert count == len(self.slots)
        keep(gradient, tuple(self.slots))
        self.slots = []

    def load_state(self, version: int, chunks: Sequence[memoryview]) -> None:
        """Take over a state; gradients accumulated for other weights are dropped. Raises `ValueError`."""
        self.trainer.load_state(version, chunks)
        self.slots = []

    def _labels(self, payload: memoryview, shape: tuple[int, ...]) -> Tensor:
        """Raises `ProtocolError` (malformed) for another size, and for labels outside the vocabulary."""
        if len(payload) != 4 * prod(shape):
            raise ProtocolError(Reason.MALFORMED, f"{len(payload)} bytes of labels")
        labels = torch.frombuffer(payload, dtype=torch.int32)
        if int(labels.min()) < 0 or int(labels.max()) >= self._manifest.model.vocabulary:
            raise ProtocolError(Reason.MALFORMED, "labels outside the vocabulary")
        return labels.view(shape).long()

    def _tail(
        self, x: Tensor, labels: Tensor, slot: int, *, covered: bool, receipt: SignedReceipt | None = None
    ) -> Returned:
        version = self.trainer.version
        accumulate = not covered and self._counts(slot, version)
        try:
            loss, gradient = self.trainer.loss_backward(
                x, labels, accumulate=accumulate, check=partial(self._check_loss, receipt)
            )
        except ValueError as error:
            raise ProtocolError(Reason.NOT_FINITE, str(error)) from None
        if accumulate:
            self.slots.append(slot)
        if gradient is None:
            return Returned(None, version, loss, self.state_of(version))

        def redo(ago: int) -> Tensor:
            return self.trainer.redo(self._before(version, ago), x, labels=labels)

        sent = self._send(Direction.GRADIENT, version, slot, x, gradient, redo)
        return Returned(sent, version, loss, self.state_of(version))

    def _forward(self, x: Tensor, labels: memoryview, input_digest: bytes, slot: int) -> Forwarded:
        graph = self.trainer.forward(x)
        graph.state, graph.labels = self.state_of(graph.version), labels
        inputs = graph.output if self.trainer.module.is_first else x

        def redo(ago: int) -> Tensor:
            return self.trainer.redo(self._before(graph.version, ago), x)

        sent = self._send(Direction.ACTIVATION, graph.version, slot, inputs, graph.output, redo, labels)
        return Forwarded(graph, sent, input_digest)

    def _before(self, version: int, ago: int) -> int:
        return max(version - ago, self.trainer.oldest)

    def _send(
        self,
        direction: Direction,
        version: int,
        slot: int,
        inputs: Tensor,
        output: Tensor,
        redo: Redo,
        *more: memoryview,
    ) -> Outgoing | None:
        """The output as it goes out; of a testbed's attacker another one, or nothing."""
        if self.sabotage is None:
            return self._outgoing(output, *more)
        sent = self.sabotage.send(direction, version, slot, inputs, output, redo)
        return None if sent is None else self._outgoing(sent, *more)

    def _counts(self, slot: int, version: int) -> bool:
        """Whether a gradient made with `version` of the weights may still be used for this slot."""
        if self._manifest.schedule.kind == "synchronous":
            return slot // self._manifest.batch.microbatches == version == self.trainer.version
        return self.trainer.version - version <= 1

    def _read(self, received: Held, direction: Direction, labels: memoryview) -> Tensor:
        """`labels`: an activation's own, or those that a gradient answers."""
        x = decode_tensor(received.payload[: self.header.size], self.header, self._device)
        # One pass without a mask in memory: the sum is finite only if every element is.
        if not bool(torch.isfinite(x.sum())):
            raise ProtocolError(Reason.NOT_FINITE)
        self._ask_guard(x, received, direction, labels)
        return x

    def _ask_guard(self, x: Tensor, received: Held, direction: Direction, labels: memoryview) -> None:
        """Raises `ProtocolError` (flagged)."""
        guard, signed = self.guards.get(direction), received.receipt
        if guard is None or signed is None:
            return
        receipt = signed.receipt

        def check() -> bool:
            # Python's own hash, of digests: its key is new in every process, so nobody can make two tensors look alike.
            statement = (
                receipt.sender,
                hash(received.leaves[: len(x)]),
                receipt.input,
                receipt.microbatch.slot,
            )
            passes = self._repeats.judged(*statement)
            if passes is None:
                passes = guard.check(x, receipt.sender, labels.cast("i"), version=self.trainer.version)
                self._repeats.note(*statement, may_be_used=passes)
            return passes

        if not self._now_and_then_timed(check):
            self._flag(receipt)

    def _check_loss(self, signed: SignedReceipt | None, loss: float) -> None:
        """Raises `ProtocolError` (flagged)."""
        if signed is None or self._loss_guard is None:
            return
        receipt, is_retry = signed.receipt, signed.receipt.microbatch.attempt > 0
        check = partial(self._loss_guard.check, loss, receipt.sender, is_retry=is_retry)
        if not self._now_and_then_timed(check):
            self._flag(receipt)

    def _now_and_then_timed(self, check: Callable[[], bool]) -> bool:
        self._checks += 1
        if self._checks % _TIMED_EVERY:
            return check()
        began = thread_time()
        passes = check()
        self.guard_seconds += _TIMED_EVERY * (thread_time() - began)
        return passes

    def _flag(self, receipt: Receipt) -> None:
        """Raises `ProtocolError` (flagged), unless the text seems to be what is odd."""
        if not self._is_odd_itself(receipt):
            raise ProtocolError(Reason.FLAGGED, str(receipt.microbatch))

    def _is_odd_itself(self, receipt: Receipt) -> bool:
        """Whether it seems to be the text that is odd: another sender's tensor of it was flagged here before, or this
        one's and there is no other; or it was lost so often that it would be lost for ever, and the run with it."""
        key, sender = (receipt.microbatch.slot, receipt.direction), receipt.sender
        senders = self._flagged.setdefault(key, set())
        is_known = senders - {sender} or (senders and self.guards[receipt.direction].hears_only(sender))
        if is_known or receipt.microbatch.attempt >= _LENIENT_FROM:
            return True
        senders.add(sender)
        if len(self._flagged) > _MAX_FLAGGED:
            self._flagged.popitem(last=False)
        return False

    def _outgoing(self, tensor: Tensor, *more: memoryview) -> Outgoing:
        parts = (encode_tensor(tensor, self.header.codec), *more)
        return Outgoing(parts, payload_digest(self.header, *parts))
