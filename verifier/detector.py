"""What every detector offers, and what a host (the mesh, a live verifier) must offer to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from verifier.ladder import Standing
from verifier.streams import Hops, Judgement, Mask, Peer


@dataclass(frozen=True)
class Hearing:
    """How a recomputation ended. `guilty` is None if nobody could recompute. `cost` is in forward passes of one hop."""

    guilty: bool | None
    cost: float


class Court(Protocol):
    """Other replicas of the stage, who can be asked to redo a hop. The host plays it; see `verifier.audit`."""

    def quorum(self, hops: Hops) -> int:
        """How many equal answers about these hops cannot all be lies: more than attackers in a minority can give."""
        ...

    def most(self, hops: Hops) -> float:
        """The highest cost that one hearing about these hops can have."""
        ...

    def hear(self, hops: Hops, row: int) -> Hearing: ...


@runtime_checkable
class Doubts(Protocol):
    """A court that can also ask a single replica, which is cheap: one that agrees acquits, one that does not proves
    nothing by itself (`guilty` is None), and leaves the evidence as it was."""

    def doubt(self, hops: Hops, row: int) -> Hearing: ...


class Detector(ABC):
    """Judges streams. Used from one thread; hops may come in any order and any number at a time."""

    @abstractmethod
    def judge(self, hops: Hops, court: Court) -> Judgement:
        """Decide about hops that were sampled for judging, before they are used."""

    def guard(self, hops: Hops) -> Mask:
        """(N,) which hops look so odd from the outside that they must be judged though they were not sampled."""
        return np.zeros(len(hops), dtype=np.bool_)

    def standing(self, peer: Peer) -> Standing:
        """How a peer stands now. The default knows only peers in good standing."""
        return Standing()


class LetPass(Detector):
    """`none`: everything passes."""

    def judge(self, hops: Hops, court: Court) -> Judgement:
        return Judgement(np.zeros(len(hops), dtype=np.bool_))
