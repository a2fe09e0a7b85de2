"""How many microbatches a head keeps in flight in the overlapped schedule. Pure.

Too few leave stages idle; more than that only wait in queues, and while they wait the weights move on, so that their
gradients come back a round late. So the window follows from how long the trips take, as in congestion control: twice
what is on its way when nothing queues, and one more. Now and then it is half of that for a moment, or queues of its
own making would pass for the way. Source: BBR's window of twice the product of rate and shortest round trip, and its
probes of the latter (Cardwell et al., "BBR: congestion-based congestion control", ACM Queue 14:5, 2016).
"""

from __future__ import annotations

import math

_GAIN = 2.0
_JITTER = 1.5
"""Times what is on its way: the estimate of it, from trips that differ, comes out low."""
_QUEUED = 1.0
"""Microbatches beyond that: the next one for whoever becomes free. It begins with as many."""
_CRUISE, _PROBE = 8, 2
"""How long it is whole, and how long reduced: trips, in windows."""


class Window:
    """Of one head. `note` every trip there and back; have no more in flight than `size`."""

    def __init__(self) -> None:
        self._size = _QUEUED
        self._shortest = self._shortest_before = math.inf
        self._is_probing = False
        self._left = _CRUISE * _QUEUED

    @property
    def size(self) -> int:
        """Microbatches; at least one."""
        return max(1, math.ceil((self._size - _QUEUED) / _GAIN) if self._is_probing else int(self._size))

    @property
    def unqueued(self) -> int:
        """Microbatches, at least one, where their gradients come back a round late anyway: what is on its way, as each
        one that queues makes one more of them late."""
        return max(1, round(_JITTER * (self._size - _QUEUED) / _GAIN))

    def note(self, seconds: float, in_flight: int) -> None:
        """A microbatch came back after `seconds` > 0, while `in_flight` of ours were under way, itself included."""
        self._shortest = min(self._shortest, seconds)
        if not self._is_probing:
            # Rate times shortest trip, since the rate is `in_flight / seconds` (Little's law).
            unqueued = in_flight * min(self._shortest, self._shortest_before) / seconds
            self._size += (_GAIN * unqueued + _QUEUED - self._size) / self._size
        # Of the window as it is now: one that has shrunk for a longer way should soon learn of it.
        self._left = min(self._left, _CRUISE * self._size) - 1
        if self._left <= 0:
            self._turn()

    def _turn(self) -> None:
        if self._is_probing:
            self._shortest, self._shortest_before = math.inf, self._shortest
        self._is_probing = not self._is_probing
        self._left = (_PROBE if self._is_probing else _CRUISE) * self._size
