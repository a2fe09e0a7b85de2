"""How a peer behaves towards verifiers: whether it shows what it is asked for. Pure.

Not to answer proves nothing, since networks lose things; but who wants to hide must do it again and again. So it can
make a suspect and have a peer quarantined, and never banned.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.votes import Cause, Verdict
from verifier.streams import Peer

SUSPECT_AT, QUARANTINE_AT, WORST = 2.0, 4.0, 6.0
_FORGIVEN = 0.25
"""Of a failure, for every sample shown as it should be: who fails one in five for long climbs."""


STRAY_FOR, STRAY_COUNT, STRAY_FORGOTTEN = 10.0, 3, 60.0
"""Seconds for which, and times that, a peer is found to work with other weights than its stage before it is
quarantined: who has failed a round mends that sooner. And seconds after which it may try again."""


@dataclass
class _Stray:
    first: float
    last: float
    count: int = 1


@dataclass
class _Record:
    failures: float = 0.0
    problem: str = ""
    cause: Cause = Cause.WITHHELD


class Conduct:
    """Failures a peer: up by one each, down by a little with every good answer."""

    def __init__(self) -> None:
        self._records: dict[Peer, _Record] = {}
        self._strays: dict[Peer, _Stray] = {}

    def fail(self, peer: Peer, problem: str, cause: Cause = Cause.WITHHELD) -> None:
        record = self._records.setdefault(peer, _Record())
        record.failures = min(WORST, record.failures + 1)
        record.problem, record.cause = problem, cause

    def stray(self, peer: Peer, now: float) -> None:
        """It was found to work with other weights than its stage, and had said so before."""
        known = self._strays.get(peer)
        if known is None or now - known.last > STRAY_FORGOTTEN:
            self._strays[peer] = _Stray(now, now)
        else:
            known.last, known.count = now, known.count + 1

    def return_to_fold(self, peer: Peer) -> None:
        """Another replica has made the same as it."""
        self._strays.pop(peer, None)

    def _of_strays(self, peer: Peer, now: float) -> Verdict:
        stray = self._strays.get(peer)
        if stray is None or now - stray.last > STRAY_FORGOTTEN:
            return Verdict.OK
        is_lasting = stray.count >= STRAY_COUNT and stray.last - stray.first >= STRAY_FOR
        return Verdict.QUARANTINED if is_lasting else Verdict.SUSPECT

    def please(self, peer: Peer) -> None:
        if record := self._records.get(peer):
            record.failures -= _FORGIVEN
            if record.failures <= 0:
                del self._records[peer]

    def verdict(self, peer: Peer, now: float) -> Verdict:
        return max(self._of_failures(peer), self._of_strays(peer, now), key=lambda verdict: verdict.rank)

    def _of_failures(self, peer: Peer) -> Verdict:
        failures = self._records.get(peer, _Record()).failures
        if failures >= QUARANTINE_AT:
            return Verdict.QUARANTINED
        return Verdict.SUSPECT if failures >= SUSPECT_AT else Verdict.OK

    def reason(self, peer: Peer, now: float) -> tuple[Cause, str]:
        """Why the verdict is what it is."""
        if self._of_strays(peer, now).rank > self._of_failures(peer).rank:
            return Cause.RECOMPUTED, "works with other weights than its stage"
        record = self._records.get(peer, _Record())
        return record.cause, record.problem
