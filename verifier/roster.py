"""Which row of the state arrays belongs to which peer: a bounded number, the longest unseen leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from verifier.streams import Peer


class Roster:
    """Rows for up to `capacity` peers. `on_reuse` is called with a row when it passes to another peer."""

    def __init__(self, capacity: int, on_reuse: Callable[[int], None]) -> None:
        self._rows: OrderedDict[Peer, int] = OrderedDict()
        self._capacity = capacity
        self._on_reuse = on_reuse

    def find(self, peer: Peer) -> int | None:
        return self._rows.get(peer)

    def rows(self, peers: Sequence[Peer]) -> npt.NDArray[np.intp]:
        """(n,) the row of each peer, which is now the latest seen. Newcomers get one."""
        return np.fromiter((self._row(peer) for peer in peers), dtype=np.intp, count=len(peers))

    def _row(self, peer: Peer) -> int:
        row = self._rows.get(peer)
        if row is None:
            if len(self._rows) < self._capacity:
                row = len(self._rows)
            else:
                _, row = self._rows.popitem(last=False)
                self._on_reuse(row)
            self._rows[peer] = row
        self._rows.move_to_end(peer)
        return row


def in_turns(rows: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Positions in `rows`, split so that within each part every row is different: for updates by index."""
    if len(set(rows.tolist())) == len(rows):
        return [np.arange(len(rows))]
    turn = np.array([(rows[:place] == row).sum() for place, row in enumerate(rows)])
    return [np.flatnonzero(turn == number) for number in range(int(turn.max()) + 1)]
