"""How long a sender waits for what it has sent on, and whom it leaves alone after it waited in vain. Pure.

Nobody can prove that a replica sits on its work, since networks lose things, too. But each microbatch that does not
come back is one of the few that a head has under way, and a replica that takes one after another and answers every
second of them all but stops a run whose heads wait a minute for each. So a sender waits some times longer than what it
sent to anybody usually takes, longer for each stage behind, so that the one next to the culprit is the first to give
up; and then it uses others for a while, twice as long each time. This is each sender's own experience: what it tells of
it is for people, and no peer acts on that.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from statistics import median

from protocol.identity import PeerId

FLIGHT_TIMEOUT = 60.0
"""Seconds after which a microbatch that was sent on and did not come back is given up in any case."""
_TIMES = 10.0
"""As long as a usual trip."""
_PER_HOP = 3.0
"""Seconds; less would take a pause of an honest peer's machine for a refusal."""
_REMEMBERED, _ENOUGH = 32, 8
_SHUNNED_FOR, _SHUNNED_AT_MOST = 20.0, 640.0
_FORGIVEN_AFTER = 1800.0
_MAX_PEERS = 1024


class Patience:
    """Of one sender with its next hops, behind which and with which there are `hops` stages, at least one."""

    def __init__(self, hops: int) -> None:
        self._least = _PER_HOP * hops
        self._trips: deque[float] = deque(maxlen=_REMEMBERED)
        self._strikes: OrderedDict[PeerId, tuple[int, float]] = OrderedDict()
        """How often each has let us wait, and when it did last; the longest ago first."""

    def note(self, seconds: float) -> None:
        """A trip to a next hop and back."""
        self._trips.append(seconds)

    def limit(self, attempt: int) -> float:
        """Seconds to wait for a microbatch. Longer if it was lost before: the whole stage may be slow now."""
        if len(self._trips) < _ENOUGH:
            return FLIGHT_TIMEOUT
        return min(max(self._least, _TIMES * median(self._trips)) * 2.0**attempt, FLIGHT_TIMEOUT)

    def lost(self, peer: PeerId, now: float) -> None:
        """It let us wait in vain. What else it lets us wait for while it is shunned is of the same occasion."""
        if self.shuns(peer, now):
            return
        times, last = self._strikes.pop(peer, (0, now))
        self._strikes[peer] = (1 if now - last > _FORGIVEN_AFTER else times + 1), now
        if len(self._strikes) > _MAX_PEERS:
            self._strikes.popitem(last=False)

    def shuns(self, peer: PeerId, now: float) -> bool:
        """Whether it should get nothing now, as long as there are others."""
        times, last = self._strikes.get(peer, (0, now))
        return times > 0 and now - last < min(_SHUNNED_FOR * 2.0 ** (times - 1), _SHUNNED_AT_MOST)

    def shunned(self, now: float) -> list[PeerId]:
        """Whom it shuns; who came to it last stands last."""
        return [peer for peer in self._strikes if self.shuns(peer, now)]
