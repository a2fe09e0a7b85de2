"""What a node holds of a microbatch, from its activation's arrival until some seconds after its end.

A sender keeps its output until the gradient is back, so that it can send it to another replica; a receiver keeps
tensor and receipt a while longer, so that a verifier can ask for them. All of it is in host memory, and bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, auto

from node.trainer import Pass
from protocol.codec import Payload
from protocol.identity import PeerId
from protocol.receipts import Direction, MicrobatchId, SignedReceipt
from protocol.samples import KEPT_FOR

_EMPTY = memoryview(b"")


@dataclass(frozen=True)
class Held:
    """A tensor as it came over the wire, the receipt that its sender signed for it, and the digests that make up the
    receipt's."""

    payload: memoryview = _EMPTY
    receipt: SignedReceipt | None = None
    digest: bytes = b""
    leaves: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, payload: Payload, receipt: SignedReceipt) -> Held:
        return cls(payload.data, receipt, receipt.receipt.output, payload.leaves)


@dataclass(frozen=True)
class Outgoing:
    """A tensor as it goes over the wire, in parts, and the digest of them all."""

    parts: tuple[memoryview, ...]
    digest: bytes

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))


class Phase(Enum):
    FORWARD = auto()
    """Waiting for, or in, the forward pass."""
    UNSENT = auto()
    """The output is ready; no replica of the next stage takes it yet."""
    SENT = auto()
    """With the next stage; the gradient is awaited."""
    BACKWARD = auto()
    """Waiting for, or in, the backward pass."""
    DONE = auto()


@dataclass
class Flight:
    """One microbatch at this node. `previous` is None on the head."""

    id: MicrobatchId
    previous: PeerId | None
    began: float
    phase: Phase = Phase.FORWARD
    received: Held = field(default_factory=Held)
    gradient: Held = field(default_factory=Held)
    output: Outgoing | None = None
    answer: Outgoing | None = None
    answer_version: int = -1
    state: bytes = b""
    """Which weights the work was done with."""
    graph: Pass | None = None
    version: int = -1
    """Of the weights that the forward pass used, and `answer_version` the backward pass; -1 before."""
    next: PeerId | None = None
    sent_at: float = 0.0
    queue_at_send: int = 1
    orphaned: bool = False
    """The previous hop is gone: whoever sends the same again takes its place."""
    ended: float = 0.0
    serial: int = 0
    """Its place among all that ended here, from 1."""
    flagged: Direction | None = None
    """Which of the tensors that came was so odd that it was not used."""

    @property
    def size(self) -> int:
        """Bytes of host memory in payloads, graph excepted."""
        outgoing = sum(part.size for part in (self.output, self.answer) if part is not None)
        return len(self.received.payload) + len(self.gradient.payload) + outgoing

    def release(self) -> None:
        """At its end: forget what only the work needed. What came is kept, and the answer: it may be wanted again."""
        self.output = None
        if self.graph is not None:
            self.graph.release()
            self.graph = None


class FinishedStore:
    """Finished microbatches, oldest first, for `KEPT_FOR` seconds and at most `max_bytes` of payload."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._flights: OrderedDict[MicrobatchId, Flight] = OrderedDict()
        self.bytes = 0

    def get(self, microbatch: MicrobatchId) -> Flight | None:
        return self._flights.get(microbatch)

    def add(self, flight: Flight, now: float) -> None:
        self.remove(flight.id)
        flight.ended = now
        self._flights[flight.id] = flight
        self.bytes += flight.size
        self.prune(now)

    def since(self, serial: int) -> list[Flight]:
        """Those that ended after the flight with this serial number, in order."""
        later: list[Flight] = []
        for flight in reversed(self._flights.values()):
            if flight.serial <= serial:
                break
            later.append(flight)
        return later[::-1]

    def remove(self, microbatch: MicrobatchId) -> Flight | None:
        flight = self._flights.pop(microbatch, None)
        if flight is not None:
            self.bytes -= flight.size
        return flight

    def prune(self, now: float) -> None:
        while self._flights:
            oldest = next(iter(self._flights.values()))
            if self.bytes <= self._max_bytes and now - oldest.ended <= KEPT_FOR:
                return
            self.remove(oldest.id)

    def __len__(self) -> int:
        return len(self._flights)
