"""Butterfly all-reduce among a stage's replicas: every member averages one share and sends all the result.

hivemind's `AllReduceRunner` hands out differences to the local tensor, which round differently on each peer, and
calls a round with missing parts a success (docs/protocol.md, "Why not AllReduceRunner"). Here every member gets the
same bytes of every share, or the round has failed for it and it knows.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protocol.codec import bytes_of
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.links import Answer, Link, Switchboard
from protocol.messages import MAX_CHUNK
from protocol.requests import ROUND_PART, Member, RoundPart

PART_FLOATS = MAX_CHUNK // 4
AVERAGING_TIMEOUT = 30.0
_CONCURRENT = 8
_NORM_FACTOR = 10.0


def reduce_parts(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Mean gradient over all microbatches, from each member's flat fp32 sum over its own `counts[i]`.

    The order of the parts is the order of summation. Robust in two ways that leave honest rounds untouched: a part
    with a value that is not finite is left out, and of three or more parts that are not all zero one whose norm per
    microbatch is above ten times their median is scaled down to that. (Zeros say nothing: a part of the embedding
    that only one member's tokens touched is no outlier.)
    """
    usable = [
        (part, count)
        for part, count in zip(parts, counts, strict=True)
        if count and torch.isfinite(part.sum())
    ]
    if not usable:
        return torch.zeros_like(parts[0])
    norms = [float(part.norm()) / count for part, count in usable]
    telling = sorted(norm for norm in norms if norm > 0)
    limit = _NORM_FACTOR * telling[len(telling) // 2] if len(telling) >= 3 else float("inf")
    total = torch.zeros_like(parts[0])
    for (part, _), norm in zip(usable, norms, strict=True):
        total += part if norm <= limit else part * (limit / norm)
    return total / sum(count for _, count in usable)


def shares(size: int, members: int) -> list[range]:
    """Which floats each member averages: contiguous, as even as can be."""
    bounds = [size * index // members for index in range(members + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]


def parts_of(share: range) -> Iterator[range]:
    """A share in pieces that fit one message."""
    for start in range(share.start, share.stop, PART_FLOATS):
        yield range(start, min(start + PART_FLOATS, share.stop))


@dataclass
class _Part:
    """One part of our share: what has come of it, and the mean when all has."""

    received: dict[PeerId, Tensor] = field(default_factory=dict)
    mean: asyncio.Future[Tensor] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    reducing: asyncio.Task[None] | None = None


class Averaging:
    """One attempt of one round at one member. `run` averages; `take_part` answers the others."""

    def __init__(
        self, switchboard: Switchboard, version: int, attempt: int, roster: Sequence[Member], gradient: Tensor
    ) -> None:
        self.version, self.attempt = version, attempt
        self._switchboard = switchboard
        self._own = switchboard.host.peer_id
        self._roster = list(roster)
        self._gradient = gradient
        self._peers = [PeerId(member.peer) for member in roster]
        self._shares = dict(zip(self._peers, shares(gradient.numel(), len(roster)), strict=True))
        self._parts = {part.start: _Part() for part in parts_of(self._shares[self._own])}
        self._awaited = Counter(peer for peer in self._peers for _ in parts_of(self._shares[peer]))

    async def run(self) -> Tensor:
        """The mean gradient, the same bytes at every member. Raises `ProtocolError` if any part is missing."""
        result = torch.empty_like(self._gradient)
        gate = asyncio.Semaphore(_CONCURRENT)
        for part in parts_of(self._shares[self._own]):
            self._add(self._own, part, self._gradient[part.start : part.stop])
        # Each member begins with the one after itself, or all would crowd upon the first.
        place = self._peers.index(self._own)
        work = [
            self._exchange(peer, part, result, gate)
            for peer in (*self._peers[place:], *self._peers[:place])
            for part in parts_of(self._shares[peer])
        ]
        try:
            async with asyncio.timeout(AVERAGING_TIMEOUT), asyncio.TaskGroup() as group:
                for one in work:
                    group.create_task(one)
        except TimeoutError:
            raise ProtocolError(Reason.TIMED_OUT, f"averaging round {self.version}") from None
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, ProtocolError):
                raise first from None
            raise
        return result

    async def _exchange(self, peer: PeerId, part: range, result: Tensor, gate: asyncio.Semaphore) -> None:
        """Give our part of a peer's share; get the mean."""
        target = result[part.start : part.stop]
        if peer == self._own:
            target.copy_(await asyncio.shield(self._parts[part.start].mean))
            return
        async with gate:
            link = await self._switchboard.connect(peer)
            question = RoundPart(self.version, self.attempt, part.start, part.stop)
            payload = bytes_of(self._gradient[part.start : part.stop])
            _, answer = await link.request(ROUND_PART, question, payload, timeout=AVERAGING_TIMEOUT)
        if len(answer) != len(payload):
            raise ProtocolError(Reason.MALFORMED, f"part of {len(answer)} bytes from {peer}")
        mean = torch.frombuffer(answer, dtype=torch.float32)
        if not bool(torch.isfinite(mean.sum())):
            raise ProtocolError(Reason.NOT_FINITE, f"mean from {peer}")
        target.copy_(mean)
        self._awaited[peer] -= 1

    def missing(self) -> set[PeerId]:
        """The members who have not given us their mean, or not their part of our share."""
        silent = {peer for peer in self._peers if self._awaited[peer]}
        for part in self._parts.values():
            silent |= set(self._peers) - part.received.keys()
        return silent - {self._own}

    async def take_part(self, link: Link, question: RoundPart, payload: memoryview) -> Answer:
        """A member's part of our share. Raises `ProtocolError`: wrong_peer, wrong_shape, replayed."""
        part = range(question.start, question.stop)
        if link.peer not in self._shares:
            raise ProtocolError(Reason.WRONG_PEER, "not of this roster")
        if part not in parts_of(self._shares[self._own]) or len(payload) != 4 * len(part):
            raise ProtocolError(Reason.WRONG_SHAPE, f"part {part} of {len(payload)} bytes")
        if link.peer in self._parts[part.start].received:
            raise ProtocolError(Reason.REPLAYED, f"part {part}")
        self._add(link.peer, part, torch.frombuffer(payload, dtype=torch.float32))
        mean = await asyncio.shield(self._parts[part.start].mean)
        return b"", bytes_of(mean)

    def _add(self, peer: PeerId, part: range, values: Tensor) -> None:
        state = self._parts[part.start]
        state.received[peer] = values
        if len(state.received) == len(self._peers):
            state.reducing = asyncio.create_task(self._reduce(state))

    async def _reduce(self, state: _Part) -> None:
        ordered = [state.received[one] for one in self._peers]
        state.received = dict.fromkeys(self._peers, torch.empty(0))
        counts = [member.count for member in self._roster]
        mean = await asyncio.to_thread(reduce_parts, ordered, counts)
        if not state.mean.done():
            state.mean.set_result(mean)

    def abandon(self) -> None:
        """Whoever still waits for our share is told that it will not come."""
        for part in self._parts.values():
            if not part.mean.done():
                part.mean.set_exception(ProtocolError(Reason.ABANDONED, f"round {self.version}"))
                part.mean.exception()  # Nobody may be waiting; that is no error.
