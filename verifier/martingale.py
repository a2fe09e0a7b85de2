"""The sequential test: evidence against a peer as the capital of a gambler who bets on its p-values being small.

A power bet e * p^(e-1), 0 < e < 1, has mean at most 1 while p is a valid p-value, so capital does not grow in the mean
while the peer is honest, and by Ville's inequality it *ever* passes 1/alpha with probability at most alpha. Capital is
spread over several exponents e, over the kinds of score and the two directions, and over the time at which an attack
may begin: an equal bet waits for every later start, so a long honest past costs an attacker's judge little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verifier.streams import Floats

EXPONENTS = np.array([0.08, 0.16, 0.3, 0.5, 0.75])
# Half of the stake is on starts within this many observations.
_START_SCALE = 200.0


class Capital:
    """Capital of up to `peers` peers, on `games` independent series of `kinds` p-values each. 8 bytes an entry."""

    def __init__(self, peers: int, games: int, kinds: int) -> None:
        self._running = np.full((peers, games, kinds, len(EXPONENTS)), -np.inf)
        self._seen = np.zeros((peers, games))
        self._log = np.zeros(peers)

    def forget(self, row: int) -> None:
        """Start a row anew, for another peer."""
        self._running[row] = -np.inf
        self._seen[row] = 0
        self._log[row] = 0

    def bet(self, rows: npt.NDArray[np.intp], game: int, p: Floats) -> None:
        """Play one p-value (n, K) for each of n *different* rows.

        With w(k) = h / ((k + h)(k + h + 1)) staked on a start at observation k, capital C follows
        C(k+1) = (C(k) + w(k)) * e * p^(e-1); what waits, h / (k + h), joins in `log_capital`.
        """
        seen = self._seen[rows, game]
        stake = np.log(_START_SCALE) - np.log(seen + _START_SCALE) - np.log(seen + _START_SCALE + 1)
        gain = np.log(EXPONENTS) + (EXPONENTS - 1) * np.log(p)[..., None]
        before = np.logaddexp(self._running[rows, game], stake[:, None, None])
        self._running[rows, game] = before + gain
        self._seen[rows, game] = seen + 1
        self._add_up(rows)

    def refund(self, row: int, game: int, p: Floats) -> None:
        """Take back one bet on p (K,) that should not have been played, as if p had been 1.

        Exact if it was the row's last; after later bets too little is left, never too much.
        """
        self._running[row, game] -= (EXPONENTS - 1) * np.log(p)[:, None]
        self._add_up(np.array([row]))

    def log_capital(self, rows: npt.NDArray[np.intp]) -> Floats:
        """(n,) log of all capital of each row: 0 at the start, at least -log(alpha) when to be banned."""
        log: Floats = self._log[rows]
        return log

    def _add_up(self, rows: npt.NDArray[np.intp]) -> None:
        waiting = np.log(_START_SCALE / (self._seen[rows] + _START_SCALE))[:, :, None, None]
        every = np.logaddexp(self._running[rows], waiting).reshape(len(rows), -1)
        highest = every.max(1)
        self._log[rows] = highest + np.log(np.exp(every - highest[:, None]).mean(1))
