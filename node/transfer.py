"""A stage's state from one replica to another, checked chunk by chunk, and to disk and back."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from node.compute import ComputeThread, Urgency
from node.trainer import StageTrainer, chunk_digest, state_digest
from protocol import wire
from protocol.errors import ProtocolError, Reason, UserError
from protocol.links import Answer, Link, Switchboard
from protocol.messages import MAX_CHUNK
from protocol.requests import MAX_SETTLED, STATE_CHUNK, STATE_DESCRIBE, Nothing, StateChunk, StateDescription

log = structlog.get_logger("transfer")

CHUNK_BYTES = MAX_CHUNK
_TIMEOUT = 30.0
_KEPT_VERSIONS = 2
_CONCURRENT = 4


class Sworn(Protocol):
    """What a server says of the state that it gives."""

    @property
    def digest(self) -> bytes: ...

    @property
    def averaged(self) -> int: ...

    @property
    def settled(self) -> frozenset[int]: ...


class StateServer:
    """Answers `state.describe` and `state.chunk` from snapshots of the last two versions asked for.

    `standing` is asked on the compute thread, so that it speaks of the very weights in the snapshot.
    """

    def __init__(
        self,
        switchboard: Switchboard,
        compute: ComputeThread,
        trainer: StageTrainer,
        standing: Callable[[], Sworn],
    ) -> None:
        self._compute, self._trainer, self._standing = compute, trainer, standing
        self._snapshots: OrderedDict[int, tuple[list[memoryview], list[bytes]]] = OrderedDict()
        self._lock = asyncio.Lock()
        self.is_ready = False
        switchboard.methods[STATE_DESCRIBE] = self._describe
        switchboard.methods[STATE_CHUNK] = self._chunk

    async def _describe(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        wire.decode(Nothing, body)
        if not self.is_ready:
            raise ProtocolError(Reason.NOT_READY)
        async with self._lock:
            description, chunks, digests = await self._compute.run(Urgency.ROUND, self._snapshot)
        self._snapshots[description.version] = chunks, digests
        while len(self._snapshots) > _KEPT_VERSIONS:
            self._snapshots.popitem(last=False)
        return wire.encode(description), memoryview(b"".join(digests))

    def _snapshot(self) -> tuple[StateDescription, list[memoryview], list[bytes]]:
        version, standing = self._trainer.version, self._standing()
        chunks, digests = self._snapshots.get(version, ([], []))
        # Who asks again and again must not make us hash again and again.
        if state_digest(digests) != standing.digest:
            chunks = self._trainer.state_chunks(CHUNK_BYTES)
            digests = [chunk_digest(chunk) for chunk in chunks]
        settled = tuple(sorted(standing.settled))[-MAX_SETTLED:]
        digest = state_digest(digests)
        return StateDescription(version, digest, CHUNK_BYTES, standing.averaged, settled), chunks, digests

    async def _chunk(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        question = wire.decode(StateChunk, body)
        chunks, _ = self._snapshots.get(question.version, ([], []))
        if question.index >= len(chunks):
            raise ProtocolError(Reason.EXPIRED, f"state {question.version}")
        return b"", chunks[question.index]


class FetchedState:
    """A whole state as fetched: its version, digest and chunks, each chunk checked against the description."""

    def __init__(self, description: StateDescription, chunks: list[memoryview]) -> None:
        self.version, self.digest = description.version, description.digest
        self.averaged, self.settled = description.averaged, description.settled
        self.chunks = chunks


async def fetch_state(link: Link, size: int) -> FetchedState:
    """The full state of `size` bytes from one replica, every chunk checked against the replica's own description.

    Raises `ProtocolError` (wrong_digest, malformed, or what the replica refused with).
    """
    body, digests = await link.request(STATE_DESCRIBE, Nothing(), timeout=_TIMEOUT)
    description = wire.decode(StateDescription, body)
    expected = [bytes(digests[at : at + 32]) for at in range(0, len(digests), 32)]
    if state_digest(expected) != description.digest:
        raise ProtocolError(Reason.WRONG_DIGEST, f"state of {link.peer}")
    if description.chunk_bytes != CHUNK_BYTES:
        raise ProtocolError(Reason.MALFORMED, f"chunks of {description.chunk_bytes} bytes")
    if len(expected) > size // CHUNK_BYTES + 4:
        raise ProtocolError(Reason.OVERSIZED, f"{len(expected)} chunks of state")
    gate = asyncio.Semaphore(_CONCURRENT)

    async def fetch(index: int) -> memoryview:
        async with gate:
            question = StateChunk(description.version, index)
            _, chunk = await link.request(STATE_CHUNK, question, timeout=_TIMEOUT)
        if chunk_digest(chunk) != expected[index]:
            raise ProtocolError(Reason.WRONG_DIGEST, f"chunk {index} of {link.peer}")
        return chunk

    chunks = await asyncio.gather(*(fetch(index) for index in range(len(expected))))
    return FetchedState(description, list(chunks))


class Checkpoint:
    """The last state of a stage on this disk, for the case that a volunteer comes back to a stage that all left."""

    def __init__(self, folder: Path, run: bytes, stage: int) -> None:
        self._path = folder / run.hex()[:16] / f"stage-{stage}.state"
        self._disabled = False

    def prepare(self) -> None:
        """Raises `UserError` if the folder cannot be made or written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            probe = self._path.with_suffix(f".{os.getpid()}.probe")
            try:
                probe.write_bytes(b"\0" * 65536)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot write to {self._path.parent}: {error.strerror}",
                "Free space, or name another --cache-dir",
            ) from None

    def save(self, chunks: Sequence[memoryview]) -> None:
        """Replace the file in one go. A full disk is logged once and ends checkpoints, not the node."""
        if self._disabled:
            return
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            part.replace(self._path)
        except OSError as error:
            self._disabled = True
            part.unlink(missing_ok=True)
            log.error(
                "no more checkpoints: free disk space and restart to have them",
                path=str(self._path),
                problem=error.strerror,
            )

    def load(self, trainer: StageTrainer) -> bool:
        """Take over the saved state if there is one that fits. Its version is the first 8 bytes."""
        try:
            data = self._path.read_bytes()
            trainer.load_state(int.from_bytes(data[:8], "little"), [data])
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            log.warning("checkpoint not used", path=str(self._path), problem=str(error))
            return False
        log.info("checkpoint loaded", version=trainer.version)
        return True
