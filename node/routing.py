"""Which replica of the next stage gets the next microbatch: interleaved weighted round robin, as in SWARM.

Pure. Each replica's virtual time advances by its measured service time whenever it is chosen, and the one that is
furthest behind is chosen next: so work is shared in proportion to throughput, and interleaved.
Source: SWARM Parallelism (Ryabinin et al., ICML 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from protocol.identity import PeerId

_SMOOTHING = 0.2
_UNIT = 1.0
"""What a service is counted as before any was measured, when only multiples of it matter."""
_EVEN: Mapping[PeerId, float] = {}


@dataclass
class _Lane:
    virtual_time: float
    service_time: float | None = None


class Router:
    """Of one sender, over the replicas it has met."""

    def __init__(self) -> None:
        self._lanes: dict[PeerId, _Lane] = {}
        self._first: float | None = None

    def choose(self, candidates: Collection[PeerId], burden: Mapping[PeerId, float] = _EVEN) -> PeerId | None:
        """The replica to use next, of those that can take one now; None if there is none. Charges it one service.

        `burden`: how many services it is charged instead: who is charged four gets a quarter of its share.
        """
        if not candidates:
            return None
        for peer in candidates:
            self._lane(peer)
        chosen = min(candidates, key=lambda peer: (self._lanes[peer].virtual_time, peer))
        self._lanes[chosen].virtual_time += self.service_time(chosen) * burden.get(chosen, 1.0)
        return chosen

    def measure(self, peer: PeerId, seconds: float) -> None:
        """A microbatch took `seconds` of this replica's time."""
        lane = self._lane(peer)
        if self._first is None:
            # Or who was chosen first, and charged a whole unit, would get nothing until the others have caught up.
            self._first = seconds
            for one in self._lanes.values():
                one.virtual_time *= seconds / _UNIT
        previous = lane.service_time
        lane.service_time = seconds if previous is None else previous + _SMOOTHING * (seconds - previous)

    def service_time(self, peer: PeerId) -> float:
        """Seconds; for a replica not yet measured, the mean of the others, or else the first that ever was."""
        known = [lane.service_time for lane in self._lanes.values() if lane.service_time is not None]
        own = self._lane(peer).service_time
        if own is not None:
            return own
        if known:
            return sum(known) / len(known)
        return _UNIT if self._first is None else self._first

    def forget(self, peer: PeerId) -> None:
        self._lanes.pop(peer, None)

    def _lane(self, peer: PeerId) -> _Lane:
        # A newcomer starts level with who is furthest behind: it must not be flooded to catch up with the past.
        if peer not in self._lanes:
            start = min((lane.virtual_time for lane in self._lanes.values()), default=0.0)
            self._lanes[peer] = _Lane(start)
        return self._lanes[peer]
