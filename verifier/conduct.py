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


@dataclass
class _Record:
    failures: float = 0.0
    problem: str = ""
    cause: Cause = Cause.WITHHELD


class Conduct:
    """Failures a peer: up by one each, down by a little with every good answer."""

    def __init__(self) -> None:
        self._records: dict[Peer, _Record] = {}

    def fail(self, peer: Peer, problem: str, cause: Cause = Cause.WITHHELD) -> None:
        record = self._records.setdefault(peer, _Record())
        record.failures = min(WORST, record.failures + 1)
        record.problem, record.cause = problem, cause

    def please(self, peer: Peer) -> None:
        if record := self._records.get(peer):
            record.failures -= _FORGIVEN
            if record.failures <= 0:
                del self._records[peer]

    def verdict(self, peer: Peer) -> Verdict:
        failures = self._records.get(peer, _Record()).failures
        if failures >= QUARANTINE_AT:
            return Verdict.QUARANTINED
        return Verdict.SUSPECT if failures >= SUSPECT_AT else Verdict.OK

    def reason(self, peer: Peer) -> tuple[Cause, str]:
        record = self._records.get(peer, _Record())
        return record.cause, record.problem
