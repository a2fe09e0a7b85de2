"""Asks nodes, over links: what passed, what they were sent of it, and to do work again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from protocol import wire
from protocol.codec import TensorHeader, decode_tensor
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.links import DEAD_AFTER, HEARTBEAT, Link, Switchboard
from protocol.manifest import Manifest
from protocol.messages import MAX_CHUNK
from protocol.receipts import Direction
from protocol.samples import (
    MAX_LISTED,
    MAX_WANTED,
    REDO,
    REDO_REST,
    SAMPLE_LIST,
    SAMPLE_SHOW,
    Listed,
    Redo,
    Redone,
    RedoRest,
    SampleList,
    SampleShow,
    Shown,
    Wanted,
)
from verifier.exhibits import Exhibit, Question, Work, exhibit_size, read_exhibit
from verifier.tribunal import Answer

ANSWER_WITHIN = DEAD_AFTER + 2 * HEARTBEAT
"""Seconds, longer than a link without a heartbeat lives: who hangs loses its link, and who stalls is timed out."""
_CPU = torch.device("cpu")


class Inquirer:
    """Every question raises `ProtocolError` with what the node refused with, unreachable, timed_out, or what is wrong
    with its answer."""

    def __init__(self, switchboard: Switchboard, manifest: Manifest) -> None:
        self._switchboard = switchboard
        batch = manifest.batch
        self.header = TensorHeader(manifest.wire, (batch.sequences, batch.context, manifest.model.width))
        self._row = TensorHeader(manifest.wire, (1, batch.context, manifest.model.width))
        self._last = manifest.stages.count - 1
        self._numbers = itertools.count(1)

    async def list_passages(self, link: Link, since: int) -> Listed:
        body, _ = await link.request(SAMPLE_LIST, SampleList(since), timeout=ANSWER_WITHIN)
        listed = wire.decode(Listed, body)
        if listed.serial < since or (listed.passages and listed.serial < since + len(listed.passages)):
            raise ProtocolError(Reason.MALFORMED, f"{len(listed.passages)} passages up to {listed.serial}")
        return listed

    def is_full(self, listed: Listed) -> bool:
        """Whether there may be more to list."""
        return len(listed.passages) >= MAX_LISTED

    async def show(self, holder: PeerId, questions: Sequence[Question]) -> list[Exhibit | ProtocolError]:
        """What one node shows, or what comes of asking it, in the order of the questions: all of them are put to it at
        once, and again what did not fit into its answer."""
        answers: list[Exhibit | ProtocolError] = []
        begun = memoryview(b"")
        try:
            link = self._link(holder)
            while left := questions[len(answers) :][:MAX_WANTED]:
                wanted = tuple(Wanted(one.microbatch, one.direction, one.sequence) for one in left)
                ask = SampleShow(wanted, len(begun))
                body, payload = await link.request(SAMPLE_SHOW, ask, timeout=ANSWER_WITHIN)
                shown = wire.decode(Shown, body)
                if len(begun) and not isinstance(shown.answers[0], Reason):
                    payload = memoryview(bytearray(begun) + payload)
                read, rest = self._read(left, shown, payload)
                if not read and len(rest) <= len(begun):
                    raise ProtocolError(Reason.MALFORMED, "an empty part")
                answers, begun = answers + read, rest
        except ProtocolError as error:
            answers += [error] * (len(questions) - len(answers))
        return answers

    def _read(
        self, questions: Sequence[Question], shown: Shown, payload: memoryview
    ) -> tuple[list[Exhibit | ProtocolError], memoryview]:
        """The answers that are whole, and what has come of the next."""
        answers: list[Exhibit | ProtocolError] = []
        for question, answer in zip(questions, shown.answers, strict=False):
            if isinstance(answer, Reason):
                answers.append(ProtocolError(answer, f"shown by {question.holder}"))
                continue
            size = exhibit_size(question.direction, self.header)
            if len(payload) < size:
                return answers, payload
            try:
                answers.append(read_exhibit(question, answer, payload[:size], self.header))
            except ProtocolError as error:
                answers.append(error)
            payload = payload[size:]
        if len(payload):
            raise ProtocolError(Reason.MALFORMED, f"{len(payload)} bytes that belong to nothing shown")
        return answers, payload

    async def redo(self, witness: PeerId, work: Work) -> Answer:
        """What `witness` makes of the same input with the weights of the same version."""
        link, number, inputs = self._link(witness), next(self._numbers), self._inputs(work)
        receipt, offset = work.receipt, 0
        while True:
            question = Redo(
                number=number,
                direction=work.direction,
                version=receipt.version,
                slot=receipt.microbatch.slot,
                sequence=work.sequence,
                offset=offset,
                size=len(inputs),
            )
            part = inputs[offset : offset + MAX_CHUNK]
            body, answer = await link.request(REDO, question, part, timeout=ANSWER_WITHIN)
            offset += len(part)
            if offset >= len(inputs):
                break
        redone = wire.decode(Redone, body)
        size = self._row.size
        labels_size = 4 * self._row.shape[1] if work.is_heads else 0
        if redone.size != size + labels_size:
            raise ProtocolError(Reason.MALFORMED, f"{redone.size} bytes redone")
        whole = await self._rest(link, number, redone.size, answer)
        labels = bytes(whole[size:]) if labels_size else None
        return Answer(decode_tensor(whole[:size], self._row, _CPU), redone.state, labels)

    async def _rest(self, link: Link, number: int, size: int, first: memoryview) -> memoryview:
        whole = bytearray(first)
        while len(whole) < size:
            _, part = await link.request(REDO_REST, RedoRest(number, len(whole)), timeout=ANSWER_WITHIN)
            if not len(part):
                raise ProtocolError(Reason.MALFORMED, "an empty part")
            whole += part
        return memoryview(whole)

    def _inputs(self, work: Work) -> memoryview:
        """See `protocol.samples.Redo`."""
        if work.forward is None:
            return memoryview(b"")
        if work.direction is Direction.ACTIVATION:
            return work.forward.sequence
        if work.stage == self._last:
            more = work.forward.labels
        else:
            assert work.source is not None
            more = work.source.sequence
        return memoryview(b"".join((work.forward.sequence, more)))

    def _link(self, peer: PeerId) -> Link:
        link = self._switchboard.links.get(peer)
        if link is None or not link.is_up:
            raise ProtocolError(Reason.UNREACHABLE, peer)
        return link
