"""Our detector: features, centred, ranked, bet upon; and a rare recomputation where that cannot decide.

`screen` looks and changes nothing; `record` learns. Between the two a host may ask other replicas about the hops that
`screen` wants heard: at once in the mesh, a network round trip later in a live verifier.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.votes import Verdict
from verifier import features
from verifier.audit import Auditor
from verifier.baseline import Centring, MeanByToken, MeanTensor, Spread
from verifier.cascade import Cascade
from verifier.conformal import Window, p_values
from verifier.detector import Court, Detector, Hearing
from verifier.ladder import Ladder, Standing
from verifier.martingale import Capital, losses, power_bets, rank_bets
from verifier.roster import Roster, in_turns
from verifier.second_opinion import Refusal, Refusals
from verifier.streams import Ban, Direction, Floats, Hops, Judgement, Mask, Peer, StageIndex, Stream
from verifier.violations import ViolationCounter

# With fewer scores in the reference, being the highest of them means little.
_RANKABLE = 100
# Until the reference is this long, nothing is bet on it, and only scores up to the cut are believed, lest attackers who
# were there from the first round be what all others are compared with. Fewer than one honest score in a hundred is
# beyond it.
_YOUNG, _YOUNG_CUT = 200, 4.0
# Hops outside a group by which it is seen that a stream has changed as a whole.
_LATEST = 12
# Kept for those who would be banned, in forward passes: two opinions about gradients, six about activations.
_KEPT = 6.0
_GAMES = {Direction.ACTIVATION: 0, Direction.GRADIENT: 1}


@dataclass(frozen=True)
class Settings:
    """Every number that `sentinel` has. None of them was chosen for a particular attack.

    - `alpha`: the chance of ever banning an honest peer by evidence alone.
    - `refuse`: the p-value of a family of features at which a tensor is odd: heard in court or refused.
    - `outlier`: how many times the typical score is odd while there are too few scores for ranks.
    - `guard`: the marginal score, in robust standard deviations, that a receiver reports though it was not sampled.
    - `window`: accepted scores remembered a stream.
    - `probation`: rounds that a score waits before it is believed.
    - `margin`: what p-values are multiplied by before they are bet on: a stream that drifts is not quite exchangeable.
    - `memory`: weight of the old mean tensor per hop (the paper's 0.9 and 0.8 for a step of 8 replicas).
    - `peers`: how many are monitored.
    - `recompute`: the share of all compute that recomputation may take; 0 is off.
    - `families`, `centring`, `ranks` (bets on ranks within a step), `counter` are for ablations.
    """

    alpha: float = 1e-3
    refuse: float = 1 / 500
    outlier: float = 5.0
    guard: float = 6.0
    window: int = 512
    probation: int = 4
    margin: float = 2.0
    memory: dict[Direction, float] = field(
        default_factory=lambda: {Direction.ACTIVATION: 0.9 ** (1 / 8), Direction.GRADIENT: 0.8 ** (1 / 8)}
    )
    peers: int = 1024
    recompute: float = 0.009
    families: tuple[str, ...] = ("marginal", "transition", "tokens")
    centring: bool = True
    ranks: bool = True
    counter: bool = False


@dataclass
class _StreamState:
    """What is known of one stream: 12 KiB of scores, two mean tensors, centres and spreads."""

    mean: MeanTensor
    mean_step: MeanTensor
    by_token: MeanByToken
    marginal: Centring
    transition: Centring
    spread: Spread
    reference: Window
    latest: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=_LATEST))
    waiting: deque[tuple[int, npt.NDArray[np.intp], Floats]] = field(default_factory=deque)


@dataclass(frozen=True)
class Screening:
    """What `screen` saw of N hops.

    `steps` (N, W) are their mean steps. `raw` (N, K) are the scores before any discount, `unspread` those after the
    cascade's. `gains` (N, kinds, bets) are the logs of what betting on the hops wins. `confirmed`, by
    position, are refusals that a hop proves wrong. `wanted` (N,) should be heard if affordable, and first of them the
    `accused` (N,), who would be banned for this hop.
    """

    hops: Hops
    rows: npt.NDArray[np.intp]
    valid: Mask
    marginal: Floats
    marginal_residuals: Floats
    transition: Floats | None
    transition_residuals: Floats | None
    steps: features.Singles | None
    raw: Floats
    unspread: Floats
    scores: Floats
    p: Floats
    gains: Floats
    confirmed: dict[int, list[Refusal]]
    odd: Mask
    wanted: Mask
    accused: Mask
    in_group: bool
    quorum: int


class Sentinel(Detector):
    """See docs/verification.md for the statistics and their promise."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._ladder = Ladder(self.settings.alpha)
        self._streams: dict[Stream, _StreamState] = {}
        self._cascade = Cascade()
        self._refusals = Refusals()
        count = self.settings.peers
        ranked = len(self.settings.families) * self.settings.ranks
        kinds = len(self.settings.families) + ranked
        self._capital = Capital(count, len(_GAMES), kinds)
        self._losses = losses(kinds, ranked)
        self._violations = ViolationCounter(count)
        self._samples = np.zeros(count, dtype=np.int64)
        self._flags = np.zeros(count, dtype=np.int64)
        self._banned = np.zeros(count, dtype=np.bool_)
        self._bans: dict[StageIndex, int] = {}
        self._roster = Roster(count, self._forget)
        self.auditor = Auditor(self.settings.recompute, count)

    # What hosts call

    def judge(self, hops: Hops, court: Court) -> Judgement:
        screening = self.screen(hops, court.quorum(hops))
        keep = 0.0 if len(self._state(hops).reference) < _YOUNG else _KEPT
        hearings = self.auditor.hear(hops, screening.rows, screening.wanted, court, screening.accused, keep)
        return self.record(screening, hearings)

    def guard(self, hops: Hops) -> Mask:
        """Marginals alone, as a receiver can see them: what is not finite, or an outlier beyond any rank."""
        state = self._state(hops)
        if state.mean.value is None:
            return np.ones(len(hops), dtype=np.bool_)
        values = self._marginal(hops, state)
        valid = self._valid(hops, values)
        residuals = state.marginal.residuals(values, hops.round, None)
        return ~valid | (_size(residuals) > self.settings.guard)

    def standing(self, peer: Peer) -> Standing:
        row = self._roster.find(peer)
        if row is None:
            return Standing()
        evidence = float(self._evidence(np.array([row]))[0])
        verdict = Verdict.BANNED if self._banned[row] else self._ladder.verdict(evidence)
        if verdict is Verdict.BANNED and not self._banned[row]:
            verdict = Verdict.QUARANTINED  # Until it is heard.
        audits = int(self.auditor.audits[row])
        return Standing(verdict, evidence, int(self._samples[row]), int(self._flags[row]), audits)

    # Looking

    def screen(self, hops: Hops, quorum: int) -> Screening:
        """Measure and rank N hops of one stream; `quorum` is the court's. Changes nothing but the roster."""
        state = self._state(hops)
        rows = self._roster.rows(hops.peers)
        marginal = self._marginal(hops, state)
        transition, steps = self._transition(hops, state)
        valid = self._valid(hops, marginal)
        if transition is not None:
            valid &= np.isfinite(transition).all(1)
        group = self._group(hops, rows, valid, quorum)
        marginal_residuals = state.marginal.residuals(marginal, hops.round, group)
        transition_residuals = None
        if transition is not None:
            transition_residuals = state.transition.residuals(transition, hops.round, group)
        raw = self._scores(marginal_residuals, transition_residuals)
        unspread = raw / self._cascade.discount(hops, raw.shape[1])
        scores = unspread / state.spread.discount(unspread, hops.round, group)
        scores = np.where(valid[:, None], scores, np.inf)
        p = p_values(scores, state.reference)
        gains = self._gains(hops, state, valid, p, scores, quorum)
        relative = unspread / state.spread.typical(hops.round)
        if hops.from_tokens:
            relative = relative[:, :1]  # What follows from tokens has tails too heavy to be judged by size.
        odd = self._odd(state, scores, relative, valid, p)
        alike = self._refusals.alike(hops, rows, self._banned)
        confirmed = {
            place: same for place, same in alike.items() if len({one.row for one in same}) + 1 >= quorum
        }
        gains[list(alike)] = 0.0
        suspect = self._evidence(rows) >= self._ladder.top / 3
        wanted = odd | suspect
        wanted[list(confirmed)] = False
        accused = suspect & wanted
        if accused.any():
            accused &= self._would_ban(hops, rows, gains)
        return Screening(
            hops,
            rows,
            valid,
            marginal,
            marginal_residuals,
            transition,
            transition_residuals,
            steps,
            raw,
            unspread,
            scores,
            p,
            gains,
            confirmed,
            odd,
            wanted,
            accused,
            group is not None,
            quorum,
        )

    def _group(self, hops: Hops, rows: npt.NDArray[np.intp], valid: Mask, quorum: int) -> Mask | None:
        """(N,) the rows to centre on, if so many peers are here that fewer attackers than `quorum` are outnumbered.

        One a peer: those to whom refused work was handed have several, and could else be the majority of hops. Without
        those suspected, unless they are more than attackers can be: then it is the honest that look odd, and without
        them the attackers would be the majority.
        """
        if not self.settings.centring or len(set(hops.peers)) < 2 * quorum - 1:
            return None
        suspected = self._evidence(rows) >= self._ladder.top / 3
        if len(set(rows[suspected].tolist())) >= quorum:
            suspected[:] = False
        trusted = np.flatnonzero(valid & ~suspected).tolist()
        first = {int(rows[place]): place for place in reversed(trusted)}
        if not first:
            return None
        group = np.zeros(len(hops), dtype=np.bool_)
        group[list(first.values())] = True
        return group

    def _odd(self, state: _StreamState, scores: Floats, relative: Floats, valid: Mask, p: Floats) -> Mask:
        """By rank; by size `relative` to the step's typical score while there are too few to rank against."""
        known = len(state.reference)
        if known < _RANKABLE:
            odd: Mask = ~valid | (relative.max(1) > self.settings.outlier)
            return odd
        rare: Mask = p.min(1) <= max(self.settings.refuse, 1 / (1 + known))
        if known * self.settings.refuse < 1:
            # To be the highest of so few happens more often than an honest tensor may be refused: it must be as much
            # higher as a heavy tail, of index 3, would have it.
            beyond = (known * self.settings.refuse) ** (-1 / 3)
            rare &= ~valid | (scores > beyond * state.reference.values().max(0)).any(1)
        return rare

    def _state(self, hops: Hops) -> _StreamState:
        state = self._streams.get(hops.stream)
        if state is None:
            memory = self.settings.memory[hops.direction]
            count = len(features.TRANSITION) + len(features.TOKENS)
            state = self._streams[hops.stream] = _StreamState(
                MeanTensor(memory),
                MeanTensor(memory),
                MeanByToken(),
                Centring(len(features.MARGINAL)),
                Centring(count),
                Spread(len(self.settings.families)),
                Window(len(self.settings.families), self.settings.window),
            )
        return state

    def _marginal(self, hops: Hops, state: _StreamState) -> Floats:
        directions = features.projections(hops.outputs.shape[-1])
        distances = features.marginal_distances(hops.outputs, self._mean(hops, state), directions)
        return features.log_marginal(distances)

    def _mean(self, hops: Hops, state: _StreamState) -> Tensor:
        """(T, W) what is usual; in the first step, the replicas' median."""
        return hops.outputs.nanmedian(0).values.mean(0) if state.mean.value is None else state.mean.value

    def _inputs(self, hops: Hops, state: _StreamState) -> Tensor | None:
        """(N, B, T, W) what went in; for tokens, what usually comes out for them."""
        if hops.inputs is None or not hops.from_tokens:
            return hops.inputs
        if not state.by_token.ready:
            return None
        return state.by_token.expect(hops.inputs, self._mean(hops, state).mean(0))

    def _transition(
        self, hops: Hops, state: _StreamState
    ) -> tuple[Floats, features.Singles] | tuple[None, None]:
        """Features (N, F) and mean steps (N, W), if what went in can be had."""
        inputs = self._inputs(hops, state)
        if inputs is None:
            return None, None
        return features.transition(inputs, hops.outputs, state.mean_step.value)

    def _valid(self, hops: Hops, marginal: Floats) -> Mask:
        """What arrived and is finite. L2 sums every element, so it is finite only if they all are."""
        valid: Mask = hops.delivered & np.isfinite(marginal).all(1)
        return valid

    def _scores(self, marginal: Floats, transition: Floats | None) -> Floats:
        """(N, K) root mean square residual of each family of features; 0 where it cannot be had."""
        cut = len(features.TRANSITION)
        parts = {"marginal": marginal}
        if transition is not None:
            parts |= {"transition": transition[:, :cut], "tokens": transition[:, cut:]}
        scores = np.zeros((len(marginal), len(self.settings.families)))
        for column, family in enumerate(self.settings.families):
            if family in parts:
                scores[:, column] = _size(parts[family])
        return scores

    def _evidence(self, rows: npt.NDArray[np.intp]) -> Floats:
        """(n,) nats against each row, of which the ladder's top is a ban."""
        if self.settings.counter:
            return self._violations.share(rows) * self._ladder.top
        return self._capital.log_capital(rows)

    def _gains(
        self, hops: Hops, state: _StreamState, valid: Mask, p: Floats, scores: Floats, quorum: int
    ) -> Floats:
        """(N, kinds, bets) log gains of betting on p-values, and on ranks if several peers' hops are here.

        Nothing is won or lost on p-values while there are too few scores to rank against, unless nothing usable came.
        """
        gains = power_bets(np.minimum(1.0, self.settings.margin * p))
        if len(state.reference) < _YOUNG:
            gains[valid] = 0.0
        if not self.settings.ranks:
            return gains
        ranked = np.zeros_like(gains)
        peers = len(set(hops.peers))
        if peers > 1:
            ranked = rank_bets(scores, (quorum - 1) / max(peers, 2 * quorum - 1))
        return np.concatenate([gains, ranked], axis=1)

    def _would_ban(self, hops: Hops, rows: npt.NDArray[np.intp], gains: Floats) -> Mask:
        """(N,) whose peer would be banned for this hop, if it is not shown innocent."""
        if self.settings.counter:
            return self._evidence(rows) >= self._ladder.top
        would: Mask = self._capital.after(rows, _GAMES[hops.direction], gains) >= self._ladder.top
        return would

    # Learning

    def record(self, screening: Screening, hearings: dict[int, Hearing]) -> Judgement:
        """Take in what was seen and what was heard (by row), and decide."""
        hops, rows = screening.hops, screening.rows
        innocent, guilty = np.zeros(len(hops), dtype=np.bool_), np.zeros(len(hops), dtype=np.bool_)
        for row, hearing in hearings.items():
            innocent[row], guilty[row] = hearing.guilty is False, hearing.guilty is True
        for row, refusals in screening.confirmed.items():
            innocent[row] = True
            for refusal in refusals:
                self._capital.refund(refusal.row, _GAMES[hops.direction], refusal.gains)
        self._weigh(screening, innocent)
        self._forgive_a_majority(screening)
        evidence = self._evidence(rows)
        accused = (evidence >= self._ladder.top) & ~innocent
        heard = np.zeros(len(hops), dtype=np.bool_)
        heard[list(hearings)] = True
        # If more look guilty than attackers can be, the references are off: then nobody is banned without a hearing,
        # or only on evidence of alpha squared.
        sure = heard | (evidence >= 2 * self._ladder.top) | (self.settings.recompute <= 0)
        sure |= self._can_all_be_guilty(screening)
        convicted = guilty | (accused & sure)
        refused = (screening.odd & ~innocent) | accused | convicted
        bans = self._ban(screening, convicted, guilty, evidence)
        self._flags[rows[screening.odd & ~innocent]] += 1
        self._refusals.note(hops, rows, screening.gains - self._losses, refused)
        self._cascade.note(hops, screening.raw, ~refused & screening.valid, innocent)
        if not screening.in_group and not self._state(hops).marginal.knows(hops.round):
            self._notice_change(screening, innocent)
        self._learn(screening, ~refused)
        return Judgement(refused, bans)

    def _weigh(self, screening: Screening, innocent: Mask) -> None:
        """Bet on each hop's p-values; a hop found innocent counts as the most ordinary one."""
        game = _GAMES[screening.hops.direction]
        gains = np.where(innocent[:, None, None], self._losses, screening.gains)
        for places in in_turns(screening.rows):
            rows = screening.rows[places]
            self._samples[rows] += 1
            self._capital.bet(rows, game, gains[places])
            self._violations.count(rows, screening.odd[places] & ~innocent[places])

    def _forgive_a_majority(self, screening: Screening) -> None:
        """If more of a stage's peers are all but banned than attackers can be, it is the stream that has changed.

        All of them start anew, also those whom less is held against: if only the former did, the attackers among them
        would be in better standing than the honest.
        """
        accused = self._all_but_banned(screening.rows)
        if screening.in_group and len(accused) >= screening.quorum:
            for row in set(screening.rows[~self._banned[screening.rows]].tolist()):
                self._capital.forget(row)
                self._violations.forget(row)

    def _all_but_banned(self, rows: npt.NDArray[np.intp]) -> set[int]:
        """Those of the rows that are two thirds of the way to a ban."""
        close = (self._evidence(rows) >= self._ladder.top * 2 / 3) & ~self._banned[rows]
        return set(rows[close].tolist())

    def _can_all_be_guilty(self, screening: Screening) -> bool:
        """Whether those of the stage that are banned or nearly so are no more than a minority of its peers."""
        nearly = len(self._all_but_banned(screening.rows))
        banned = self._bans.get(screening.hops.stage, 0)
        return nearly + banned <= (2 * screening.quorum - 2 + banned) // 2

    def _ban(self, screening: Screening, convicted: Mask, guilty: Mask, evidence: Floats) -> tuple[Ban, ...]:
        hops, bans = screening.hops, []
        for row in np.flatnonzero(convicted):
            if self._banned[screening.rows[row]]:
                continue
            self._banned[screening.rows[row]] = True
            self._bans[hops.stage] = self._bans.get(hops.stage, 0) + 1
            reason = (
                f"recomputation of a {hops.direction} differs"
                if guilty[row]
                else f"evidence of {evidence[row]:.1f} nats, {self._ladder.top:.1f} allowed"
            )
            bans.append(Ban(hops.peers[row], hops.stage, hops.round, reason))
        return tuple(bans)

    def _learn(self, screening: Screening, accepted: Mask) -> None:
        hops, state = screening.hops, self._state(screening.hops)
        accepted = accepted & screening.valid
        good = accepted & (self._evidence(screening.rows) < self._ladder.top / 3)
        chosen = np.flatnonzero(good)
        if not len(chosen):
            return
        if state.marginal.ready:
            state.spread.learn(screening.unspread[chosen])
        hops = hops if len(chosen) == len(hops) else hops.take(chosen)
        state.mean.update(features.mean_tensor(hops.outputs), len(hops))
        state.marginal.learn(screening.marginal[chosen], screening.marginal_residuals[chosen])
        if screening.transition is not None and screening.transition_residuals is not None:
            assert screening.steps is not None
            state.mean_step.update(torch.from_numpy(screening.steps[chosen].mean(0)), len(hops))
            state.transition.learn(screening.transition[chosen], screening.transition_residuals[chosen])
        if hops.from_tokens:
            assert hops.inputs is not None
            state.by_token.update(hops.inputs, hops.outputs)
        if state.marginal.settled and (hops.inputs is None or state.transition.settled):
            state.waiting.append((hops.round, screening.rows[chosen], screening.scores[chosen]))
        self._end_probation(state, hops.round)

    def _notice_change(self, screening: Screening, innocent: Mask) -> None:
        """Start a baseline anew if most peers look odd by it, and more than attackers can be: it is not they who are.

        In a group the step's median sees to that, also for what its round brings later; this is for rounds of which
        hops come one by one.
        """
        state = self._state(screening.hops)
        state.latest.extend(zip(screening.rows.tolist(), (screening.odd & ~innocent).tolist(), strict=True))
        peers = {row for row, _ in state.latest}
        odd = {row for row, was_odd in state.latest if was_odd}
        if len(state.latest) == _LATEST and len(odd) >= screening.quorum and 2 * len(odd) > len(peers):
            state.latest.clear()
            state.marginal.restart()
            state.transition.restart()

    def _end_probation(self, state: _StreamState, round: int) -> None:
        """Believe the scores that have waited long enough, of peers that are still in good standing."""
        while state.waiting and state.waiting[0][0] <= round - self.settings.probation:
            _, rows, scores = state.waiting.popleft()
            good = ~self._banned[rows] & (self._evidence(rows) < self._ladder.top / 3)
            if len(state.reference) < _YOUNG:
                good &= scores.max(1) <= _YOUNG_CUT
            state.reference.admit(scores[good])

    def _forget(self, row: int) -> None:
        self._capital.forget(row)
        self._violations.forget(row)
        self.auditor.forget(row)
        self._samples[row] = self._flags[row] = 0
        self._banned[row] = False


def _size(residuals: Floats) -> Floats:
    size: Floats = np.sqrt(np.square(residuals).sum(1) / residuals.shape[1])
    return size
