"""What peers tell everyone, over gossip: their progress in a stage's round, and their figures.

Both say the whole current truth each time, so a lost message costs a moment and never an error.
The author is the gossip message's signer; see `protocol.gossip`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol import wire
from protocol.directory import PeerState
from protocol.wire import Count, Digest, Natural, PeerName, StageField

MAX_SLOTS = 8192
MAX_SHUNNED = 32
Slots = Annotated[tuple[Natural, ...], msgspec.Meta(max_length=MAX_SLOTS)]
ReasonName = Annotated[str, msgspec.Meta(max_length=32)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]


class Progress(wire.Message, frozen=True):
    """Of one replica in its stage's round, on `{run}/progress/{stage}`.

    `version`: the weights it holds, and so the round it works on; `digest`: of its full state at that version.
    `slots`: whose gradients it has accumulated for this round; `in_flight`: those a head has injected and that are
    not back; `settled`: slots of late rounds that are averaged into the weights; `averaged`: how many microbatches
    have gone into the weights since the run began.
    """

    stage: StageField
    version: Natural
    digest: Digest
    state: PeerState
    slots: Slots
    in_flight: Slots
    settled: Slots
    averaged: Natural


class SlotLoss(wire.Message, frozen=True):
    """Mean loss of a slot's tokens in nats, at the tail."""

    slot: Natural
    loss: _Finite


class Metrics(wire.Message, frozen=True):
    """A peer's figures since it joined, on `{run}/metrics`. Counts are of microbatches unless named otherwise.

    `guarded`: tensors that the inline guard looked at; `guard_seconds` and `redo_seconds`: CPU time that it took, by
    samples, and that doing others' work again for verifiers took; `to_banned`: sent to a peer that this one knew to be
    banned; `shunned`: next hops that did not send back what they were sent, and get nothing for a while.
    """

    stage: StageField
    version: Natural
    digest: Digest
    state: PeerState
    microbatches: Count
    lost: Count
    rerouted: Count
    in_flight: Count
    tokens_per_second: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    sent_bytes: Natural
    refused: Annotated[dict[ReasonName, Natural], msgspec.Meta(max_length=64)]
    losses: Annotated[tuple[SlotLoss, ...], msgspec.Meta(max_length=MAX_SLOTS)]
    waiting_for: Annotated[int, msgspec.Meta(ge=-1, le=4095)]
    guarded: Natural = 0
    guard_seconds: _Seconds = 0.0
    redo_seconds: _Seconds = 0.0
    to_banned: Count = 0
    shunned: Annotated[tuple[PeerName, ...], msgspec.Meta(max_length=MAX_SHUNNED)] = ()


def progress_topic(run: bytes, stage: int) -> str:
    return f"{run.hex()}/progress/{stage}"


def metrics_topic(run: bytes) -> str:
    return f"{run.hex()}/metrics"
