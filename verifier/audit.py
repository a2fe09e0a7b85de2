"""Recomputation: when it is worth its price, and what counts as the same tensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from verifier.detector import Court, Doubts, Hearing
from verifier.streams import Direction, Floats, Hops, Mask

TOLERANCE = 0.01
TOKEN_TOLERANCE = 0.05


def agrees(sent: Tensor, redone: Tensor) -> bool:
    """Whether a tensor (B, T, W) is what a recomputation gave, up to what other hardware and rounding may change.

    The difference may be 1% of the whole and 5% of any one token, in L2 norm. bf16 rounding moves an element by 0.4%
    at most; what fits inside is too small to do harm.
    """
    lengths, differences = _squares(redone), _squares(sent - redone)
    # Asked this way round, so that what is not finite does not agree.
    if not differences.sum() <= TOLERANCE**2 * lengths.sum():
        return False
    typical = np.sort(lengths)[(len(lengths) - 1) // 2]
    return bool((differences <= TOKEN_TOLERANCE**2 * np.maximum(lengths, typical)).all())


def _squares(tensor: Tensor) -> Floats:
    """(B x T,) squared lengths of the tokens of a tensor (B, T, W)."""
    tokens = tensor.float().flatten(0, -2).numpy()
    squares: Floats = np.vecdot(tokens, tokens).astype(np.float64)
    return squares


class Auditor:
    """Spends at most `budget` of all compute on recomputing hops. Those by which a peer would be banned come first, and
    a hearing of one of them is kept in reserve; then those that are wanted; and what is left over goes to the peers
    that were not looked at for longest, so that nobody can feel safe.

    Compute is counted in forward passes of one hop; backward passes count two. `audits` (peers,) counts hearings a row.
    """

    # What must be saved for wanted hops before anything goes to routine checks, in worst-case hearings.
    reserve = 4

    def __init__(self, budget: float, peers: int) -> None:
        self._budget = budget
        self._savings = 0.0
        self._waited = np.zeros((peers, 2))
        self.audits = np.zeros(peers, dtype=np.int64)

    def forget(self, row: int) -> None:
        self._waited[row] = 0
        self.audits[row] = 0

    def hear(
        self,
        hops: Hops,
        rows: npt.NDArray[np.intp],
        wanted: Mask,
        court: Court,
        accused: Mask | None = None,
        keep: float = 0.0,
    ) -> dict[int, Hearing]:
        """Hearings by position in `hops`, as many as can be paid in full even at their worst. `accused` (N,) of the
        wanted would ban their peer: one opinion is enough for them, and `keep` passes are kept for such."""
        if self._budget <= 0:
            return {}
        game = int(hops.direction is Direction.GRADIENT)
        self._savings += self._budget * (1 + game) * len(hops)
        self._waited[rows, game] += 1
        most = court.most(hops)
        hearings: dict[int, Hearing] = {}
        urgent = np.zeros(len(hops), dtype=np.bool_) if accused is None else accused & wanted
        for place in self._choose(rows, game, wanted, urgent, most):
            brief = urgent[place] and isinstance(court, Doubts)
            price = 1.0 + 2.0 * game if brief else most if urgent[place] else keep + most
            if self._savings < price:
                break
            hearing = (
                court.doubt(hops, place) if brief and isinstance(court, Doubts) else court.hear(hops, place)
            )
            self._savings -= hearing.cost
            self._waited[rows[place], game] = 0
            self.audits[rows[place]] += 1
            hearings[place] = hearing
        return hearings

    def _choose(
        self, rows: npt.NDArray[np.intp], game: int, wanted: Mask, urgent: Mask, most: float
    ) -> list[int]:
        chosen: list[int] = [*np.flatnonzero(urgent).tolist(), *np.flatnonzero(wanted & ~urgent).tolist()]
        if self._savings >= self.reserve * most:
            longest = int(np.argmax(self._waited[rows, game]))
            if longest not in chosen:
                chosen.append(longest)
        return chosen
