"""Who has done what in a stage's round, and what follows from it. Pure: reports in, decisions out.

Slots number the run's microbatches; round r consists of the slots r*M up to (r+1)*M. In the synchronous schedule
a stage's round ends when its live replicas have, between them, all slots of the round; in the overlapped one when
the stage has had (r + 1) * M gradients, of whatever slots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from protocol.directory import PeerState
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.manifest import Manifest
from protocol.reports import Progress
from protocol.requests import MAX_ROSTER

LIVE_FOR = 6.0
"""Seconds for which a replica's last report counts."""
ROUNDS_AHEAD = 2
"""How many rounds after its own a head injects slots of, in the overlapped schedule."""
_SETTLED_ROUNDS = 3
_WORKING = (PeerState.SERVING, PeerState.WAITING, PeerState.LEAVING, PeerState.FINISHED)


@dataclass
class _Heard:
    progress: Progress
    at: float


@dataclass
class StageProgress:
    """What is known of a stage's replicas, ourselves included, from their latest reports."""

    manifest: Manifest
    _heard: dict[PeerId, _Heard] = field(default_factory=dict)

    def hear(self, peer: PeerId, progress: Progress, now: float) -> None:
        """Raises `ProtocolError` (too_early) for a version that the run does not have."""
        if progress.version > self.manifest.schedule.rounds:
            raise ProtocolError(Reason.TOO_EARLY, f"version {progress.version}")
        if peer in self._heard or len(self._heard) < MAX_ROSTER:
            self._heard[peer] = _Heard(progress, now)

    def forget(self, peer: PeerId) -> None:
        self._heard.pop(peer, None)

    def prune(self, now: float) -> None:
        for peer in [peer for peer, heard in self._heard.items() if now - heard.at > LIVE_FOR]:
            del self._heard[peer]

    def replicas(self) -> dict[PeerId, Progress]:
        """The latest reports of replicas that hold the stage's state."""
        return {
            peer: heard.progress for peer, heard in self._heard.items() if heard.progress.state in _WORKING
        }

    def members(self, version: int) -> list[PeerId]:
        """Who is in round `version`, in the order in which they would lead it.

        The order differs from round to round, and nobody can choose it but by making another identity.
        """
        peers = [peer for peer, progress in self.replicas().items() if progress.version == version]
        return sorted(peers, key=lambda peer: blake2b(f"{version}/{peer}".encode(), digest_size=8).digest())

    def newest(self) -> int:
        """The highest version that at least half of the replicas have reached; -1 without replicas.

        Half of them and not one: a single liar must not make the others chase a version that nobody holds.
        """
        versions = sorted((progress.version for progress in self.replicas().values()), reverse=True)
        return versions[(len(versions) - 1) // 2] if versions else -1

    def covered(self) -> set[int]:
        """Slots whose gradients some live replica has accumulated, or that are averaged in already."""
        return {
            slot
            for progress in self.replicas().values()
            for slots in (progress.slots, progress.settled)
            for slot in slots
        }

    def round_slots(self, version: int) -> list[int]:
        """What the members of a round have accumulated for it, duplicates kept."""
        return [slot for peer in self.members(version) for slot in self._heard[peer].progress.slots]

    def is_round_full(self, version: int) -> bool:
        """Whether the members of round `version` have reached the run's batch."""
        return self.missing(version) == 0

    def missing(self, version: int) -> int:
        """Microbatches that the members of round `version` still need."""
        size = self.manifest.batch.microbatches
        if self.manifest.schedule.kind == "synchronous":
            return len(set(range(version * size, (version + 1) * size)) - self.covered())
        # Counted from the run's beginning: what one round has too much, the next one needs less.
        averaged = max((self._heard[peer].progress.averaged for peer in self.members(version)), default=0)
        return max(0, (version + 1) * size - averaged - len(self.round_slots(version)))

    def agreed_digest(self, version: int) -> bytes | None:
        """The state digest of the majority at `version`; of equals the least. None without replicas there."""
        votes: dict[bytes, int] = {}
        for progress in self.replicas().values():
            if progress.version == version:
                votes[progress.digest] = votes.get(progress.digest, 0) + 1
        return min(votes, key=lambda digest: (-votes[digest], digest)) if votes else None


def open_slots(manifest: Manifest, version: int, *, beyond: bool = False) -> range:
    """The slots that a head at `version` may inject.

    In the synchronous schedule those of its round. In the overlapped one also those of the next two, since over long
    links a round's worth is under way and another one's gradients are being averaged meanwhile; and of late ones, where
    a slot that was lost may still be missing. There, `beyond`, slots after the run's last one stand in for those that
    were lost too long ago: rounds are counted in gradients.
    """
    size, last = manifest.batch.microbatches, manifest.schedule.rounds - 1
    if manifest.schedule.kind == "synchronous":
        return range(version * size, (version + 1) * size)
    end = version + ROUNDS_AHEAD
    end = end if beyond else min(end, last)
    return range(max(0, version - _SETTLED_ROUNDS + 1) * size, (end + 1) * size)


def next_slot(
    heads: StageProgress, own: PeerId, version: int, taken: Collection[int], *, is_idle: bool = False
) -> int | None:
    """The slot that head `own` should inject next, or None if there is none for it now.

    Live heads share the uncovered slots of the open rounds by rank, so a dead head's slots pass to the others.
    `taken`: slots that `own` itself has in flight or done. `is_idle`: it has waited long enough for others; then it
    takes their shares too, and slots beyond the run's end. A slot that two inject is still averaged once.
    """
    replicas = heads.replicas()
    ranks = sorted({*(peer for peer, progress in replicas.items() if is_injecting(progress)), own})
    others = {slot for peer, progress in replicas.items() if peer != own for slot in progress.in_flight}
    busy = heads.covered() | others | set(taken)
    rank, count = ranks.index(own), len(ranks)
    for slot in open_slots(heads.manifest, version, beyond=is_idle):
        if (is_idle or slot % count == rank) and slot not in busy:
            return slot
    return None


def is_injecting(progress: Progress) -> bool:
    return progress.state in (PeerState.SERVING, PeerState.WAITING)


def still_settled(settled: Iterable[int], version: int, size: int) -> frozenset[int]:
    """The part of `settled` that anyone may still ask about at `version`."""
    return frozenset(slot for slot in settled if slot >= (version - _SETTLED_ROUNDS) * size)
