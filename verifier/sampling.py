"""What has passed through the run, and what of it is looked at. Pure: clock and randomness are the caller's.

A sample is a *panel*: microbatches that ended lately and between them passed through every replica of every stage, so
that each replica can be compared with the others of the same moment. It is drawn after the tensors were receipted, by
randomness that only this verifier knows, so nobody can know in advance what will be looked at.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from protocol.identity import PeerId
from protocol.receipts import Direction, MicrobatchId
from protocol.samples import DRAWN_WITHIN, KEPT_FOR, Passage
from verifier.streams import StageIndex

MAX_KNOWN = 4096
SPEAK_WITHIN = 5.0
"""Seconds within which everybody on a microbatch's way must have said what it did."""
_HALF = 1.0
"""Seconds in which a microbatch's weight in the draw halves, from its end on: any may be drawn, and an attack is best
seen soon."""
_REPLICA = 4.0
"""Seconds that a microbatch may be older for each replica more that it brings in: they are compared with each other."""

_MAX_CANDIDATES = 256
"""Of more that might be drawn, so many are by an even lot: a draw looks at each again and again."""

Path = Mapping[StageIndex, PeerId]


@dataclass
class Journey:
    """One microbatch: where it passed, as those who held it say, and what was odd about it."""

    microbatch: MicrobatchId
    heard: float
    """When anybody first told us."""
    began: float
    """When it seems to have ended where it ended first, where what was sent is the first to be forgotten."""
    ended: float
    """When it seems to have ended where it ended last."""
    path: dict[StageIndex, PeerId] = field(default_factory=dict)
    flagged: dict[tuple[StageIndex, Direction], PeerId] = field(default_factory=dict)
    """By the stage of the receiver who flagged it: the sender of what was flagged."""
    states: dict[PeerId, bytes] = field(default_factory=dict)
    """The weights that each holder says it used; whoever is not in it has not spoken for itself yet."""
    drawn: bool = False

    @property
    def peers(self) -> set[PeerId]:
        return set(self.path.values())

    def blamed(self, stages: int) -> set[PeerId]:
        """Whose work on it others should do again: who sent what was flagged; and where a tail flagged it, as it does
        for its loss, the head too, whose labels may be others than the text's."""
        blamed = set(self.flagged.values())
        if (stages - 1, Direction.ACTIVATION) in self.flagged and 0 in self.path:
            blamed.add(self.path[0])
        return blamed


class Traffic:
    """The latest `MAX_KNOWN` microbatches."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._journeys: OrderedDict[MicrobatchId, Journey] = OrderedDict()
        self._alarms: dict[MicrobatchId, Journey] = {}
        """Flagged, as of the last `alarms` and since."""
        self.finished = 0
        """Microbatches that a head has had back."""

    def take(
        self, holder: PeerId, stage: StageIndex, passages: Sequence[Passage], since: float, now: float
    ) -> None:
        """Take in all that `holder` tells of the time between `since` and `now`, oldest first: spread evenly over it,
        as nobody's clock is asked."""
        since = max(since, now - KEPT_FOR)
        for number, passage in enumerate(passages, 1):
            self._note(holder, stage, passage, now, since + (now - since) * number / len(passages))

    def _note(self, holder: PeerId, stage: StageIndex, passage: Passage, now: float, ended: float) -> None:
        """A holder speaks for itself, and only names its neighbours."""
        journey = self._journeys.get(passage.microbatch)
        if journey is None:
            journey = self._journeys[passage.microbatch] = Journey(passage.microbatch, now, ended, ended)
            if len(self._journeys) > MAX_KNOWN:
                oldest, _ = self._journeys.popitem(last=False)
                self._alarms.pop(oldest, None)
        journey.began, journey.ended = min(journey.began, ended), max(journey.ended, ended)
        journey.path[stage] = holder
        journey.states.setdefault(holder, passage.state)
        if passage.previous is not None and stage > 0:
            journey.path.setdefault(stage - 1, PeerId(passage.previous))
        if passage.next is not None and stage < self._stages - 1:
            journey.path.setdefault(stage + 1, PeerId(passage.next))
        sender = passage.previous if passage.flagged is Direction.ACTIVATION else passage.next
        if passage.flagged is not None and sender is not None:
            journey.flagged[stage, passage.flagged] = PeerId(sender)
            self._alarms[passage.microbatch] = journey
        if stage == 0 and passage.next is not None and passage.flagged is None:
            self.finished += 1

    def has_seen(self, peer: PeerId, since: float) -> bool:
        """Whether anybody has named the peer as a neighbour in a microbatch first heard of after `since`."""
        for journey in reversed(self._journeys.values()):
            if journey.heard < since:
                break
            if peer in journey.path.values():
                return True
        return False

    def alarms(self, now: float) -> list[Journey]:
        """What receivers flagged and nobody has looked at yet."""
        self._alarms = {
            key: one for key, one in self._alarms.items() if not one.drawn and now - one.began <= DRAWN_WITHIN
        }
        return list(self._alarms.values())

    def draw_alarm(self, generator: random.Random, now: float) -> Journey | None:
        """One of them, a fresh one rather than an old one, whose weights nobody may have any more to do it again."""
        alarms = self.alarms(now)
        if not alarms:
            return None
        return generator.choices(alarms, [2 ** ((one.ended - now) / _HALF) for one in alarms])[0]

    def draw(
        self,
        generator: random.Random,
        now: float,
        *,
        most: int,
        wanted: Mapping[PeerId, float] | None = None,
        start: Journey | None = None,
    ) -> list[Journey]:
        """A panel of at most `most`, beginning with `start`: each adds replicas that were not in it yet, the more the
        likelier. Until they have come twice, peers in `wanted` are worth so many replicas more.
        """
        panel = [start] if start is not None else []
        ready = [one for one in self._fresh(now) if one is not start and self._is_ready(one, now)]
        some = ready if len(ready) <= _MAX_CANDIDATES else generator.sample(ready, _MAX_CANDIDATES)
        pool = [(one, one.peers) for one in some]
        covered = {peer for one in panel for peer in one.peers}
        due = dict(wanted or {})

        def lot(candidate: tuple[Journey, set[PeerId]]) -> float:
            one, peers = candidate
            replicas = len(peers - covered) + sum(due.get(peer, 0.0) for peer in peers)
            # A weighted draw without replacement (Efraimidis and Spirakis, 2006).
            return generator.expovariate(2 ** ((_REPLICA * replicas - (now - one.ended)) / _HALF))

        while len(panel) < most and (pool := [it for it in pool if it[1] - covered or it[1] & due.keys()]):
            best, peers = chosen = min(pool, key=lot)
            pool.remove(chosen)
            panel.append(best)
            for peer in peers & covered:
                due.pop(peer, None)
            covered |= peers
        for journey in panel:
            journey.drawn = True
        return panel

    def _is_ready(self, journey: Journey, now: float) -> bool:
        """Whether its whole path is known, and everybody on it has spoken for itself or has had the time to."""
        if journey.drawn or len(journey.path) < self._stages:
            return False
        return now - journey.heard > SPEAK_WITHIN or all(
            peer in journey.states for peer in journey.path.values()
        )

    def _fresh(self, now: float) -> list[Journey]:
        fresh = []
        for journey in reversed(self._journeys.values()):
            if now - journey.heard > DRAWN_WITHIN:
                break
            if now - journey.began <= DRAWN_WITHIN:
                fresh.append(journey)
        return fresh


@dataclass
class Allowance:
    """Something that may be spent at a rate and saved up to a limit: a token bucket without a clock of its own."""

    limit: float
    saved: float

    def earn(self, amount: float) -> None:
        self.saved = min(self.limit, self.saved + amount)

    def can_pay(self, price: float) -> bool:
        return self.saved >= price

    def pay(self, price: float) -> None:
        self.saved -= price
