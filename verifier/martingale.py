"""The sequential test: evidence against a peer as the capital of a gambler who bets against its being honest.

A bet is a number that is not negative and has mean at most 1 while the peer is honest, so capital does not grow in the
mean, and by Ville's inequality it *ever* passes 1/alpha with probability at most alpha. Two ways of betting:

- on p-values being small: e * p^(e-1), 0 < e < 1;
- on a hop being among the k oddest of the n that its stage sent in this step: each is with probability k / n, whatever
  the stream does, for all replicas hold the same weights. This needs no history, and no stream that stands still.

Capital is spread over several bets of each kind, over the kinds of score and the two directions, and over the time at
which an attack may begin: an equal bet waits for every later start, so a long honest past costs an attacker's judge
little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verifier.streams import Floats

EXPONENTS = np.array([0.08, 0.16, 0.3, 0.5, 0.75])
# Of rank bets: k as a share of the hops that a minority of attackers can have, and the part of the capital at stake.
TOP_SHARES = np.array([1 / 3, 2 / 3, 1.0, 2 / 3, 1.0])
STAKES = np.array([0.5, 0.5, 0.5, 0.9, 0.9])
BETS = len(EXPONENTS)
# Half of the stake is on starts within this many observations.
_START_SCALE = 200.0


def power_bets(p: Floats) -> Floats:
    """(n, K, bets) log gains of betting on p-values (n, K)."""
    gains: Floats = np.log(EXPONENTS) + (EXPONENTS - 1) * np.log(p)[..., None]
    return gains


def rank_bets(scores: Floats, minority: float) -> Floats:
    """(n, K, bets) log gains of betting that scores (n, K) of one step are among its highest; of equal scores none is.

    `minority` is the share of the hops that attackers can have.
    """
    n = len(scores)
    ranks = (scores[None] >= scores[:, None]).sum(1)
    top = np.maximum(1, np.floor(TOP_SHARES * minority * n + 1e-9))
    gains: Floats = np.log(1 - STAKES + STAKES * np.where(ranks[..., None] <= top, n / top, 0.0))
    return gains


def losses(kinds: int, ranked: int) -> Floats:
    """(kinds, bets) log gains of the most ordinary hop: p-values of 1, and the last `ranked` kinds not at the top."""
    lost: Floats = np.concatenate(
        [power_bets(np.ones(kinds - ranked)), np.tile(np.log(1 - STAKES), (ranked, 1))]
    )
    return lost


class Capital:
    """Capital of up to `peers` peers, on `games` independent series of `kinds` x bets each. 8 bytes an entry."""

    def __init__(self, peers: int, games: int, kinds: int) -> None:
        self._running = np.full((peers, games, kinds, BETS), -np.inf)
        self._seen = np.zeros((peers, games))
        self._log = np.zeros(peers)

    def forget(self, row: int) -> None:
        """Start a row anew, for another peer."""
        self._running[row] = -np.inf
        self._seen[row] = 0
        self._log[row] = 0

    def bet(self, rows: npt.NDArray[np.intp], game: int, gains: Floats) -> None:
        """Take in the log gains (n, kinds, bets) of one hop for each of n *different* rows.

        With w(k) = h / ((k + h)(k + h + 1)) staked on a start at observation k, capital C follows
        C(k+1) = (C(k) + w(k)) * gain; what waits, h / (k + h), joins in `log_capital`.
        """
        self._running[rows, game] = self._played(rows, game, gains)
        self._seen[rows, game] += 1
        self._log[rows] = _log_mean(self._running[rows], self._seen[rows])

    def after(self, rows: npt.NDArray[np.intp], game: int, gains: Floats) -> Floats:
        """(n,) what `log_capital` would be after these gains, each row's as if it were its only one."""
        running, seen = self._running[rows], self._seen[rows]
        running[:, game] = self._played(rows, game, gains)
        seen[:, game] += 1
        return _log_mean(running, seen)

    def _played(self, rows: npt.NDArray[np.intp], game: int, gains: Floats) -> Floats:
        seen = self._seen[rows, game]
        stake = np.log(_START_SCALE) - np.log(seen + _START_SCALE) - np.log(seen + _START_SCALE + 1)
        played: Floats = np.logaddexp(self._running[rows, game], stake[:, None, None]) + gains
        return played

    def refund(self, row: int, game: int, gains: Floats) -> None:
        """Take back log gains (kinds, bets) that should not have been made.

        Exact if they were the row's last; after later bets too little is left, never too much.
        """
        self._running[row, game] -= gains
        self._log[row] = _log_mean(self._running[row][None], self._seen[row][None])[0]

    def log_capital(self, rows: npt.NDArray[np.intp]) -> Floats:
        """(n,) log of all capital of each row: 0 at the start, at least -log(alpha) when to be banned."""
        log: Floats = self._log[rows]
        return log


def _log_mean(running: Floats, seen: Floats) -> Floats:
    """(n,) log of the mean over all bets: what runs (n, games, kinds, bets), what waits after `seen` (n, games)."""
    waiting = np.log(_START_SCALE / (seen + _START_SCALE))[:, :, None, None]
    every = np.logaddexp(running, waiting).reshape(len(running), -1)
    highest = every.max(1)
    log: Floats = highest + np.log(np.exp(every - highest[:, None]).mean(1))
    return log
