"""Hearings: other replicas of the stage do a piece of work again, and what they get decides.

An answer counts only together with others that say the same: those who differ from the accused must agree with each
other, and be so many that attackers in a minority cannot be them all.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from protocol.errors import ProtocolError
from protocol.identity import PeerId
from verifier.audit import agrees
from verifier.exhibits import Work
from verifier.streams import Direction

PRICE = {Direction.ACTIVATION: 1.0, Direction.GRADIENT: 3.0}
"""Of one witness, in forward passes of one sequence: a gradient takes the forward pass again, and two to go back."""

FEWEST_WITNESSES = 2
"""One witness against one accused: nobody can say which of them lies."""


@dataclass(frozen=True)
class Answer:
    """What a witness made, (1, T, W), and with which weights; of a head's activation also the labels that it has."""

    tensor: Tensor
    state: bytes
    labels: bytes | None = None


Redo = Callable[[PeerId, Work], Awaitable[Answer]]


def needed_of(witnesses: int) -> int:
    """How many of them must be against the accused, and say the same."""
    return max(FEWEST_WITNESSES, witnesses // 2 + 1)


def worst_price(direction: Direction, witnesses: int) -> float:
    """The most that a conviction by so many witnesses costs, if all who are asked can say."""
    return PRICE[direction] * needed_of(witnesses)


@dataclass(frozen=True)
class Finding:
    """`guilty` is None if too few could say. `difference` is relative to what the witnesses got, in L2 norm; `state`
    the weights that they had; `liars` are witnesses that the others contradict; `is_relabelled` says that the labels
    differ."""

    guilty: bool | None
    asked: int
    difference: float = 0.0
    state: bytes = b""
    liars: tuple[PeerId, ...] = ()
    is_relabelled: bool = False


async def hear(work: Work, witnesses: Sequence[PeerId], redo: Redo, generator: random.Random) -> Finding:
    """Ask one witness after the other until the work is confirmed or enough are against it.

    `witnesses` are the other replicas of the stage in good standing. Who does not answer counts neither way.
    """
    needed = needed_of(len(witnesses))
    order = list(witnesses)
    generator.shuffle(order)
    against: list[tuple[PeerId, Answer]] = []
    asked = 0
    for witness in order:
        try:
            answer = await redo(witness, work)
        except ProtocolError:
            continue
        asked += 1
        is_relabelled = answer.labels not in (None, bytes(work.output.labels))
        if not is_relabelled and agrees(work.output.tensor, answer.tensor):
            # Of other weights something else is made: that is no lie.
            liars = tuple(peer for peer, other in against if other.state == answer.state)
            return Finding(False, asked, liars=liars)
        against.append((witness, answer))
        same = [
            peer
            for peer, other in against
            if (other.state, other.labels) == (answer.state, answer.labels)
            and agrees(other.tensor, answer.tensor)
        ]
        if len(same) >= needed:
            difference = _difference(work.output.tensor, answer.tensor)
            return Finding(True, asked, difference, answer.state, is_relabelled=is_relabelled)
    return Finding(None, asked)


def _difference(sent: Tensor, redone: Tensor) -> float:
    difference = float((sent - redone).double().norm() / redone.double().norm().clamp_min(1e-30))
    return difference if difference == difference else float("inf")
