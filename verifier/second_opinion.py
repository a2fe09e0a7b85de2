"""When a refused hop is made again by other replicas, their outputs judge each other.

Replicas hold the same weights, so if as many workers as attackers can never be, knowing nothing of one another, send
the same tensor, then it was the text that was odd, and none of them. That is a recomputation that costs nothing: the
work had to be done again. Until so many have, their saying the same is no evidence against any but the first: to whom
an odd text is handed again is sure to look odd too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from verifier.audit import agrees
from verifier.streams import Direction, Floats, Hops, Mask

_Place = tuple[int, Direction, int, int]


@dataclass(frozen=True)
class Refusal:
    """A refused output (B, T, W) of the peer in `row`, and what the bets (kinds, bets) on it won, in logs."""

    row: int
    output: Tensor
    gains: Floats


class Refusals:
    """The refused outputs of the latest `memory` places, a place being a stage, a direction and a microbatch."""

    def __init__(self, memory: int = 64) -> None:
        self._latest: OrderedDict[_Place, list[Refusal]] = OrderedDict()
        self._memory = memory

    def alike(self, hops: Hops, rows: npt.NDArray[np.intp], banned: Mask) -> dict[int, list[Refusal]]:
        """By position in `hops`: the refused outputs of other peers that were the same, if there are any.

        `banned`, by row: whose word does not count, as a quorum is one of those who are left.
        """
        found = {}
        for place, row in enumerate(rows):
            earlier = self._latest.get(_place(hops, place), ())
            others = [one for one in earlier if one.row != row and not banned[one.row]]
            if same := [one for one in others if agrees(hops.outputs[place], one.output)]:
                found[place] = same
        return found

    def note(self, hops: Hops, rows: npt.NDArray[np.intp], gains: Floats, refused: Mask) -> None:
        for place in np.flatnonzero(refused & hops.delivered):
            key = _place(hops, int(place))
            refusal = Refusal(int(rows[place]), hops.outputs[place].clone(), gains[place])
            self._latest.setdefault(key, []).append(refusal)
            if len(self._latest) > self._memory:
                self._latest.popitem(last=False)


def _place(hops: Hops, place: int) -> _Place:
    return hops.stage, hops.direction, hops.round, hops.microbatches[place]
