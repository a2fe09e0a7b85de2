"""What a receiver remembers of who sent it what: the guards' memory. All of it is bounded."""

from __future__ import annotations

from collections import OrderedDict, deque
from statistics import median_low
from typing import NamedTuple

from verifier.streams import Peer

_LATEST, _OF_EACH = 24, 8
_SOON = 8
"""Versions of the weights: a shorter silence makes nothing out of date."""
_MOST_SENDERS = 256
_AT_ONCE = 0.75
"""Of its limit: the most that a single tensor adds to a sum."""


class _Arrival(NamedTuple):
    sender: Peer
    is_odd: bool
    version: int


class Latest:
    """The latest tensors: by whom, whether they were odd, and the version of the receiver's weights then.

    Of a sender no more than its latest eight count, so that one that sends alone is believed as soon as it would be
    among others.
    """

    def __init__(self) -> None:
        self._latest: deque[_Arrival] = deque(maxlen=_LATEST)

    def are_outdated(self, version: int) -> bool:
        """Whether nothing has come for longer than all that is remembered took to come."""
        if not self._latest:
            return False
        oldest, newest = self._latest[0].version, self._latest[-1].version
        return version - newest > max(_SOON, newest - oldest)

    def note(self, sender: Peer, is_odd: bool, version: int = 0) -> bool:
        """Whether most senders are odd by now: then it is not they who have changed."""
        self._latest.append(_Arrival(sender, is_odd, version))
        if not is_odd or len(self._latest) < _LATEST:
            return False
        of_each: dict[Peer, list[bool]] = {}
        for one in reversed(self._latest):
            own = of_each.setdefault(one.sender, [])
            if len(own) < _OF_EACH:
                own.append(one.is_odd)
        if 2 * sum(2 * sum(own) > len(own) for own in of_each.values()) <= len(of_each):
            return False
        self.clear()
        return True

    def clear(self) -> None:
        self._latest.clear()

    def are_all_of(self, sender: Peer) -> bool:
        """Whether nobody else has sent anything of late."""
        return all(one.sender == sender for one in self._latest)


def _note_latest(known: OrderedDict[Peer, float], sender: Peer, value: float) -> None:
    """The longest unheard is forgotten first."""
    known[sender] = value
    known.move_to_end(sender)
    if len(known) > _MOST_SENDERS:
        known.popitem(last=False)


class Sums:
    """For each sender Page's CUSUM (1954) of how odd its tensors were, in robust standard deviations, less what is
    `allowed` each time. At most twice `limit`, so that a sender that mends is believed again soon. Of the latest 256.

    No single tensor adds more than three quarters of it: what honest texts lead to has a heavy tail, and one text may
    be as odd as it likes, while a corrupt sender is odd again and again. And only what is odd itself is called so:
    nothing is gained by refusing the rest.
    """

    def __init__(self, allowed: float, limit: float) -> None:
        self._allowed, self._limit = allowed, limit
        self._sums: OrderedDict[Peer, float] = OrderedDict()

    def add(self, sender: Peer, deviation: float) -> bool:
        """Take in one more tensor; the answer is that of `is_odd`."""
        odd = min(deviation - self._allowed, _AT_ONCE * self._limit)
        total = min(max(0.0, self._sums.get(sender, 0.0) + odd), 2 * self._limit)
        _note_latest(self._sums, sender, total)
        return self.is_odd(sender, deviation)

    def is_odd(self, sender: Peer, deviation: float) -> bool:
        """Whether a tensor that deviates by so much is odd, and its sender by now, too."""
        return deviation > self._allowed and self._sums.get(sender, 0.0) > self._limit

    def __len__(self) -> int:
        return len(self._sums)

    def clear(self) -> None:
        self._sums.clear()


class Apart:
    """How odd the latest tensor of each sender was. By what those of most others are odd too, nobody is: then it is the
    stream that changes, as when weights jump that all of them hold."""

    def __init__(self) -> None:
        self._latest: OrderedDict[Peer, float] = OrderedDict()

    def beyond(self, sender: Peer, deviation: float) -> float:
        """The sender's deviation, less what the others' have in common."""
        others = [one for peer, one in self._latest.items() if peer != sender]
        _note_latest(self._latest, sender, deviation)
        # The lower one of two: of two others one may be an attacker, or one who is banned by now.
        return deviation - max(0.0, median_low(others)) if others else deviation

    def clear(self) -> None:
        self._latest.clear()


class Repeats:
    """Of one receiver: what each sender sent before, of which input, for which slot, and how that was judged.

    What comes again for its slot is a microbatch that was lost: it is evidence of nothing new, and is answered as
    before. But no two inputs give an honest stage the same output to the last bit; who sends what it sent before,
    whatever it was given, does. By hashes of digests that are there anyway: it costs a look-up. Of one sender, or
    others could make its own look repeated.
    """

    _remembered = 4096

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Peer, int], _Judged] = OrderedDict()

    def judged(self, sender: Peer, tensor: int, made_of: bytes, slot: int) -> bool | None:
        """Whether a tensor of this hash may be used, which its sender says it made of an input of that digest. None if
        that is still to be judged, and then to be `note`d."""
        known = self._known.get((sender, tensor))
        if known is None:
            return None
        if known.made_of != made_of:
            return False
        return known.may_be_used if known.slot == slot else None

    def note(self, sender: Peer, tensor: int, made_of: bytes, slot: int, *, may_be_used: bool) -> None:
        """The longest known is forgotten first."""
        self._known[sender, tensor] = _Judged(made_of, slot, may_be_used)
        if len(self._known) > self._remembered:
            self._known.popitem(last=False)


class _Judged(NamedTuple):
    made_of: bytes
    slot: int
    may_be_used: bool
