"""What a head does beyond its stage: draw the run's samples and send them on their way."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from torch import Tensor

from node.data import Corpus
from node.flights import Phase
from node.progress import next_slot
from node.replica import Replica
from protocol.directory import Directory, PeerState
from protocol.errors import ProtocolError, SentinelError
from protocol.receipts import MAX_ATTEMPT, MicrobatchId
from protocol.tasks import wait_for

_LOOK_AGAIN = 1.0
_START_POLL = 0.25
_MAX_UNSENT = 2
_PATIENCE = 3.0
"""Seconds without anything of its own to do after which a head takes what others have not begun, or nobody has to."""
_REMEMBERED_ROUNDS = 4


class Injector:
    """Injects this head's share of the open rounds' slots, as room and schedule allow."""

    def __init__(self, replica: Replica, directory: Directory, corpus: Corpus) -> None:
        self._replica, self._directory, self._corpus = replica, directory, corpus
        self._attempts: dict[int, int] = {}
        self._has_begun = False
        self._idle_since = monotonic()
        # Drawing may read from disk or network, so it has a thread of its own; a stream is read by one only.
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="draw")

    async def run(self) -> None:
        """Until cancelled. Raises `SentinelError` for a slot that is lost again and again, `UserError` for bad data."""
        try:
            while True:
                while (slot := await self._next_slot()) is not None:
                    await self._inject(slot)
                self._forget_old()
                await wait_for(self._replica.room, _LOOK_AGAIN)
        finally:
            self._drawing.shutdown(wait=False, cancel_futures=True)

    async def _inject(self, slot: int) -> None:
        attempt = self._attempts.get(slot, -1) + 1
        if attempt > MAX_ATTEMPT:
            raise SentinelError(f"slot {slot} was lost {attempt} times: this run cannot go on")
        tokens = await self.draw(slot)
        self._attempts[slot] = attempt
        self._replica.pipeline.inject(MicrobatchId(self._replica.peer_id, slot, attempt), tokens)

    async def draw(self, slot: int) -> Tensor:
        """The tokens of a slot, int64 (sequences, context + 1)."""
        return await asyncio.get_running_loop().run_in_executor(self._drawing, self._corpus.draw, slot)

    async def _next_slot(self) -> int | None:
        replica = self._replica
        pipeline, rounds = replica.pipeline, replica.rounds
        if rounds.is_over or replica.state is PeerState.LEAVING or not await self._may_begin():
            return None
        # Work that the next stage has no room for yet would only take memory here.
        unsent = sum(flight.phase in (Phase.FORWARD, Phase.UNSENT) for flight in pipeline.flights.values())
        if len(pipeline.flights) >= self._limit() or unsent >= _MAX_UNSENT:
            return None
        taken = (
            {flight.id.slot for flight in pipeline.flights.values()} | set(rounds.slots()) | rounds.settled
        )
        slot = next_slot(replica.heads, replica.peer_id, rounds.version, taken)
        if slot is not None or pipeline.flights:
            self._idle_since = monotonic()
        elif monotonic() - self._idle_since > _PATIENCE:
            # Another head is slow or stuck with its share, or too many slots were lost: nobody should wait for them.
            slot = next_slot(replica.heads, replica.peer_id, rounds.version, taken, is_idle=True)
        return slot

    def _limit(self) -> int:
        """Microbatches in flight from this head: all heads together one round's at most, and in the overlapped schedule
        no more than keep the stages busy, so that gradients stay fresh."""
        manifest, pipeline = self._replica.manifest, self._replica.pipeline
        heads = max(1, len(self._replica.heads.replicas()))
        share = min(pipeline.capacity, -(-manifest.batch.microbatches // heads))
        if manifest.schedule.kind == "synchronous":
            return share
        return min(share, pipeline.window.unqueued if self._is_ahead() else pipeline.window.size)

    def _is_ahead(self) -> bool:
        """Whether all that the round still needs is under way: what is injected now comes back for a later one."""
        heads, own = self._replica.heads, self._replica.peer_id
        others = sum(len(progress.in_flight) for peer, progress in heads.replicas().items() if peer != own)
        return others + len(self._replica.pipeline.flights) >= heads.missing(self._replica.rounds.version)

    async def _may_begin(self) -> bool:
        """Before the first round: whether every stage has the replicas that the manifest asks for."""
        replica = self._replica
        if self._has_begun or replica.rounds.version > 0:
            return True
        needed = replica.manifest.schedule.min_replicas
        for stage in range(replica.manifest.stages.count):
            try:
                records = (await self._directory.peers(stage)).values()
            except ProtocolError:
                return False
            serving = sum(record.state in (PeerState.SERVING, PeerState.WAITING) for record in records)
            if serving < needed:
                await asyncio.sleep(_START_POLL)
                return False
        self._has_begun = len(replica.heads.replicas()) >= needed
        return self._has_begun

    def _forget_old(self) -> None:
        size = self._replica.manifest.batch.microbatches
        oldest = (self._replica.rounds.version - _REMEMBERED_ROUNDS) * size
        self._attempts = {slot: attempt for slot, attempt in self._attempts.items() if slot >= oldest}
