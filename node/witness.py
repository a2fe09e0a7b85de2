"""What a node answers to verifiers: which microbatches passed, what it was sent of them, and work done again.

Only the verifiers that the manifest names are answered, and none of them gets more than its share of our uplink and of
our compute.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic, thread_time

from torch import Tensor

from node.compute import ComputeThread, Urgency
from node.flights import Flight, Held
from node.passes import StagePasses
from node.pipeline import Pipeline
from protocol import wire
from protocol.codec import split_payload
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.links import Answer, Link, Switchboard
from protocol.messages import MAX_CHUNK
from protocol.receipts import Direction, SignedReceipt
from protocol.requests import Nothing
from protocol.samples import (
    ALARM_EVERY,
    MAX_LISTED,
    REDO,
    REDO_REST,
    SAMPLE_ALARM,
    SAMPLE_LIST,
    SAMPLE_SHOW,
    Listed,
    Passage,
    Redo,
    Redone,
    RedoRest,
    SampleList,
    SampleShow,
    Shown,
    Wanted,
)
from protocol.vote_set import VoteSet

SHOWN_SHARE, SHOWN_BURST = 0.1, 64 << 20
"""Bytes that one verifier may be shown: a share of what passed through the stage here, and so many at once."""
REDO_SHARE, REDO_BURST = 0.01, 2.0
"""Seconds of compute that one verifier may have: a share of all that was spent, and so many at once."""
_MAX_JOBS = 4
_JOB_LIFE = 30.0
_EMPTY = memoryview(b"")


@dataclass
class _Job:
    """A redo as its parts arrive, then its result as it is fetched."""

    question: Redo
    began: float
    inputs: bytearray = field(default_factory=bytearray)
    result: memoryview = _EMPTY


class Witness:
    """Answers `sample.list`, `sample.show`, `redo` and `redo.rest`. `draw` is a head's: the tokens of a slot."""

    def __init__(
        self,
        switchboard: Switchboard,
        votes: VoteSet,
        compute: ComputeThread,
        passes: StagePasses,
        pipeline: Pipeline,
    ) -> None:
        self._switchboard, self._votes, self._compute = switchboard, votes, compute
        self._passes, self._pipeline = passes, pipeline
        self._verifiers = verifiers = votes.electorate.verifiers
        self._shown_bytes: Counter[PeerId] = Counter()
        self._redo_seconds: dict[PeerId, float] = dict.fromkeys(verifiers, 0.0)
        self._jobs: OrderedDict[tuple[PeerId, int], _Job] = OrderedDict()
        self.draw: Callable[[int], Awaitable[Tensor]] | None = None
        switchboard.methods[SAMPLE_LIST] = self._list
        switchboard.methods[SAMPLE_SHOW] = self._show
        switchboard.methods[REDO] = self._redo
        switchboard.methods[REDO_REST] = self._rest

    @property
    def seconds(self) -> float:
        """Spent on doing work again."""
        return sum(self._redo_seconds.values())

    def _check_verifier(self, link: Link) -> None:
        if link.peer not in self._verifiers:
            raise ProtocolError(Reason.WRONG_PEER, f"{link.peer} is no verifier of this run")

    # --- what passed ---

    async def sound_alarm(self) -> None:
        """Once something is flagged, tell the verifiers, so that they ask at once what it is."""
        await self._pipeline.flagged.wait()
        self._pipeline.flagged.clear()
        links = [link for peer, link in self._switchboard.links.items() if peer in self._verifiers]
        # Whom it does not reach asks anyway, a little later.
        tellings = [link.request(SAMPLE_ALARM, Nothing(), timeout=ALARM_EVERY) for link in links]
        await asyncio.gather(*tellings, return_exceptions=True)

    async def _list(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        self._check_verifier(link)
        since = wire.decode(SampleList, body).since
        stores = (self._pipeline.finished, self._pipeline.dropped)
        ended = sorted((one for store in stores for one in store.since(since)), key=lambda one: one.serial)
        told = ended[:MAX_LISTED]
        serial = told[-1].serial if told else since
        return wire.encode(Listed(serial, self._votes.digest(), tuple(map(_passage, told)))), _EMPTY

    async def _show(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        """The checks, in order: verifier, form; then of each that is wanted: held (expired), sequence (wrong_shape),
        share (busy)."""
        self._check_verifier(link)
        question = wire.decode(SampleShow, body)
        answers: list[SignedReceipt | Reason] = []
        parts: list[memoryview] = []
        room, offset = MAX_CHUNK, question.offset
        for wanted in question.wanted:
            skipped, offset = offset, 0
            try:
                receipt, exhibit = self._exhibit(link.peer, wanted)
            except ProtocolError as error:
                self._switchboard.refusals.count(link.peer, error)
                answers.append(error.reason)
                continue
            exhibit = exhibit[skipped:]
            if answers and len(exhibit) > room:
                break
            answers.append(receipt)
            parts.append(exhibit[:room])
            room -= len(parts[-1])
            self._shown_bytes[link.peer] += len(parts[-1])
        return wire.encode(Shown(tuple(answers))), memoryview(b"".join(parts))

    def _exhibit(self, verifier: PeerId, wanted: Wanted) -> tuple[SignedReceipt, memoryview]:
        pipeline, header = self._pipeline, self._passes.header
        places = (pipeline.finished, pipeline.dropped, pipeline.flights)
        flight = next((one for place in places if (one := place.get(wanted.microbatch))), None)
        held = _held(flight, wanted.direction)
        if held is None or held.receipt is None:
            raise ProtocolError(Reason.EXPIRED, f"{wanted.microbatch}")
        if wanted.sequence >= header.shape[0]:
            raise ProtocolError(Reason.WRONG_SHAPE, f"sequence {wanted.sequence}")
        passed = pipeline.counts["microbatches"] * self._passes.payload_size
        if self._shown_bytes[verifier] > SHOWN_BURST + SHOWN_SHARE * passed:
            raise ProtocolError(Reason.BUSY, "shown enough")
        tensor, *labels = split_payload(header, held.payload)
        size = len(tensor) // header.shape[0]
        own = tensor[wanted.sequence * size : (wanted.sequence + 1) * size]
        return held.receipt, memoryview(b"".join((*held.leaves, own, *labels)))

    # --- doing work again ---

    async def _redo(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        """The checks, in order: verifier, form, share (busy), size and order of the parts (malformed)."""
        self._check_verifier(link)
        question = wire.decode(Redo, body)
        allowed = REDO_BURST + REDO_SHARE * self._compute.busy_seconds
        if self._redo_seconds[link.peer] > allowed:
            raise ProtocolError(Reason.BUSY, "recomputed enough")
        if question.size > self._passes.redo_limit:
            raise ProtocolError(Reason.OVERSIZED, f"{question.size} bytes to recompute from")
        job = self._job(link.peer, question)
        if question.offset != len(job.inputs) or question.offset + len(payload) > question.size:
            raise ProtocolError(Reason.MALFORMED, f"part at {question.offset} of {question.size}")
        job.inputs += payload
        if len(job.inputs) < question.size:
            return b"", _EMPTY
        job.result, state = await self._carry_out(link.peer, question, memoryview(job.inputs))
        return wire.encode(Redone(len(job.result), state)), job.result[:MAX_CHUNK]

    def _job(self, peer: PeerId, question: Redo) -> _Job:
        """The job that a part belongs to: a new one for a first part. At most `_MAX_JOBS` of a verifier are kept."""
        now, key = monotonic(), (peer, question.number)
        for known in [known for known, job in self._jobs.items() if now - job.began > _JOB_LIFE]:
            del self._jobs[known]
        if question.offset == 0:
            self._jobs.pop(key, None)
            own = [known for known in self._jobs if known[0] == peer]
            for known in own[: len(own) - _MAX_JOBS + 1]:
                del self._jobs[known]
            self._jobs[key] = _Job(question, now)
        job = self._jobs.get(key)
        if job is None or (job.question.version, job.question.size) != (question.version, question.size):
            raise ProtocolError(Reason.UNSOLICITED, f"part of redo {question.number}")
        return job

    async def _carry_out(self, peer: PeerId, question: Redo, inputs: memoryview) -> tuple[memoryview, bytes]:
        """What was made, and of which weights."""
        tokens = None
        if self._passes.trainer.module.is_first and question.direction is Direction.ACTIVATION:
            if self.draw is None:
                raise ProtocolError(Reason.NOT_READY, "no samples here yet")
            tokens = await self.draw(question.slot)

        def redo() -> tuple[memoryview, bytes, float]:
            began = thread_time()
            made = self._passes.redo(question.direction, question.version, inputs, tokens, question.sequence)
            return made, self._passes.state_of(question.version), thread_time() - began

        result, state, seconds = await self._compute.run(Urgency.FORWARD, redo)
        self._redo_seconds[peer] += seconds
        return result, state

    async def _rest(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        self._check_verifier(link)
        question = wire.decode(RedoRest, body)
        job = self._jobs.get((link.peer, question.number))
        if job is None or question.offset >= len(job.result):
            raise ProtocolError(Reason.EXPIRED, f"redo {question.number}")
        return b"", job.result[question.offset : question.offset + MAX_CHUNK]


def _passage(flight: Flight) -> Passage:
    version = max(flight.version, flight.answer_version)
    return Passage(flight.id, flight.previous, flight.next, version, flight.flagged, flight.state)


def _held(flight: Flight | None, direction: Direction) -> Held | None:
    if flight is None:
        return None
    return flight.received if direction is Direction.ACTIVATION else flight.gradient
