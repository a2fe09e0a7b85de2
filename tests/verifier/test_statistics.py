"""The pieces of the core, each against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protocol.votes import Verdict
from tests.verifier.streams import Stage, hops
from verifier import features
from verifier.audit import agrees
from verifier.baseline import Centring, MeanByToken, MeanTensor, Recent, Spread
from verifier.cascade import Cascade
from verifier.conformal import Window, p_values
from verifier.ladder import Ladder
from verifier.martingale import Capital, power_bets, rank_bets
from verifier.roster import Roster, in_turns
from verifier.second_opinion import Refusals
from verifier.streams import Direction


def test_marginal_distances_are_those_of_their_names() -> None:
    mean = torch.ones(3, 4)
    outputs = torch.stack([mean[None].repeat(2, 1, 1), -mean[None].repeat(2, 1, 1)])
    distances = features.marginal_distances(outputs, mean, features.projections(4))
    assert np.allclose(distances[0], 0, atol=1e-6)
    assert np.allclose(distances[1, :3], [2, 2, 1])
    assert distances[1, 3] > 0


def test_transition_features_do_not_depend_on_the_unit_of_the_tensors() -> None:
    stage = Stage()
    x = stage.inputs(4)
    y = stage.outputs(x)
    mean_step = (y - x).mean((0, 1, 2))
    plain, steps = features.transition(x, y, mean_step)
    assert plain.shape == (4, len(features.TRANSITION) + len(features.TOKENS))
    assert np.allclose(steps, (y - x).mean((1, 2)), atol=1e-6)
    scaled, _ = features.transition(1e3 * x, 1e3 * y, 1e3 * mean_step)
    assert np.allclose(plain, scaled, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e30, -1e-30])
def test_features_of_degenerate_tensors_are_finite(value: float) -> None:
    x = torch.zeros(2, 1, 4, 8)
    y = torch.full_like(x, value if abs(value) < 1 else 1e15)
    for a, b in ((x, y), (y, x), (x, x)):
        assert np.isfinite(features.transition(a, b, torch.zeros(8))[0]).all()


def test_the_mean_tensor_does_not_depend_on_how_hops_are_batched() -> None:
    together, apart = MeanTensor(0.9), MeanTensor(0.9)
    same = torch.randn(5, 4).repeat(6, 1, 1)
    together.update(same.mean(0), len(same))
    for one in same:
        apart.update(one, 1)
    assert together.value is not None and apart.value is not None
    assert torch.allclose(together.value, apart.value, atol=1e-6)


def test_centring_takes_away_what_moves_all_replicas() -> None:
    random = np.random.default_rng(0)
    everyone = np.ones(8, dtype=np.bool_)
    centring = Centring(2)
    for round in range(30):
        values = random.normal(size=(8, 2))
        centring.learn(values, centring.residuals(values, round, everyone))
    moved = random.normal(size=(8, 2)) + 40
    assert np.abs(centring.residuals(moved, 31, everyone)).max() < 6
    assert np.abs(centring.residuals(moved, 32, None)).min() > 20


def test_a_minority_cannot_move_the_centre_or_the_spread_far() -> None:
    random = np.random.default_rng(0)
    everyone = np.ones(8, dtype=np.bool_)
    centring, spread = Centring(1), Spread(1)
    for round in range(30):
        values = random.normal(size=(8, 1))
        residuals = centring.residuals(values, round, everyone)
        centring.learn(values, residuals)
        spread.learn(np.abs(residuals))
    values = random.normal(size=(8, 1))
    values[:3] = 100
    residuals = centring.residuals(values, 31, everyone)
    scores = np.abs(residuals) / spread.discount(np.abs(residuals), 31, everyone)
    assert scores[3:].max() < 4
    assert scores[:3].min() > 20


def test_the_usual_output_of_a_token_is_learned_and_bounded() -> None:
    means, unknown = MeanByToken(), torch.full((4,), 7.0)
    tokens = torch.tensor([[[1, 2, 1]]])
    assert means.expect(tokens, unknown).eq(7).all()
    for value in (1.0, 3.0):
        means.update(tokens, torch.full((1, 1, 3, 4), value))
    assert means.expect(torch.tensor([[[1, 2, 3]]]), unknown)[0, 0].tolist() == [
        [2.0] * 4,
        [2.0] * 4,
        [7.0] * 4,
    ]
    assert means.expect(torch.tensor([[[1 + MeanByToken.rows]]]), unknown)[0, 0, 0, 0] == 2


def test_p_values_are_uniform_for_exchangeable_scores_and_never_zero() -> None:
    random = np.random.default_rng(1)
    window = Window(1, 400)
    window.admit(random.exponential(size=(1000, 1)))
    assert len(window) == 400
    p = p_values(random.exponential(size=(4000, 1)), window)
    assert abs((p <= 0.1).mean() - 0.1) < 0.04
    assert p_values(np.array([[np.inf]]), window)[0, 0] == pytest.approx(1 / 401)


def test_an_honest_peer_is_banned_with_probability_at_most_alpha() -> None:
    random = np.random.default_rng(2)
    peers, alpha = 4000, 0.01
    capital, rows = Capital(peers, 2, 3), np.arange(peers)
    ever = np.zeros(peers, dtype=np.bool_)
    for step in range(300):
        # The three kinds of score are dependent, as they are in truth.
        p = np.repeat(random.uniform(size=(peers, 1)), 3, axis=1)
        capital.bet(rows, step % 2, power_bets(np.maximum(p, 1 / 513)))
        ever |= capital.log_capital(rows) >= -np.log(alpha)
    assert ever.mean() <= alpha


@pytest.mark.parametrize("honest", [0, 100, 1000])
def test_an_attacker_is_found_soon_however_long_it_was_honest(honest: int) -> None:
    random = np.random.default_rng(3)
    capital, row = Capital(1, 2, 3), np.array([0])
    for _ in range(honest):
        capital.bet(row, 0, power_bets(random.uniform(1 / 513, 1, size=(1, 3))))
    needed = 0
    while capital.log_capital(row)[0] < -np.log(1e-3):
        capital.bet(row, 0, power_bets(np.full((1, 3), 2 / 513)))
        needed += 1
    assert needed <= 7


def _ranks(random: np.random.Generator, attackers: int) -> list[int]:
    """Rounds until each of 8 replicas is banned by ranks alone, 1,000 if never; the first are always the oddest."""
    capital, rows, banned = Capital(8, 1, 1), np.arange(8), [1000] * 8
    for step in range(300):
        # The scale of all scores wanders, as in a stream that drifts.
        scores = random.exponential(size=(8, 1)) * np.exp(step / 10)
        scores[:attackers] += 1e20
        capital.bet(rows, 0, rank_bets(scores, 3 / 8))
        for row in np.flatnonzero(capital.log_capital(rows) >= -np.log(1e-3)):
            banned[row] = min(banned[row], step)
    return banned


@pytest.mark.parametrize("attackers", [0, 1, 2, 3])
def test_ranks_within_a_step_find_a_minority_without_any_history_and_whatever_drifts(attackers: int) -> None:
    random = np.random.default_rng(attackers)
    for _ in range(20):
        banned = _ranks(random, attackers)
        assert max(banned[:attackers], default=0) <= 20
        assert min(banned[attackers:]) == 1000


def test_rank_bets_are_fair() -> None:
    random = np.random.default_rng(4)
    for count in (3, 8, 20):
        gains = np.exp(rank_bets(random.permutation(count)[:, None].astype(float), 0.4))
        assert np.allclose(gains.mean(0), 1.0)


def test_a_refund_takes_back_exactly_the_last_bet() -> None:
    refunded, ordinary, row = Capital(1, 1, 3), Capital(1, 1, 3), np.array([0])
    gains, lost = power_bets(np.array([[0.002, 0.1, 0.5]])), power_bets(np.ones((1, 3)))
    refunded.bet(row, 0, gains)
    refunded.refund(0, 0, (gains - lost)[0])
    ordinary.bet(row, 0, lost)
    assert refunded.log_capital(row) == pytest.approx(ordinary.log_capital(row))


def test_the_ladder_climbs_in_thirds() -> None:
    ladder = Ladder(1e-3)
    found = [ladder.verdict(ladder.top * share) for share in (0.0, 0.34, 0.67, 1.0)]
    assert found == [Verdict.OK, Verdict.SUSPECT, Verdict.QUARANTINED, Verdict.BANNED]


def test_the_roster_is_bounded_and_the_longest_unseen_leaves() -> None:
    reused: list[int] = []
    roster = Roster(2, reused.append)
    assert roster.rows(["a", "b", "a"]).tolist() == [0, 1, 0]
    assert roster.rows(["c"]).tolist() == [1]
    assert reused == [1] and roster.find("b") is None


def test_in_turns_never_has_a_row_twice_in_a_part() -> None:
    rows = np.array([3, 1, 3, 3, 2])
    parts = in_turns(rows)
    assert sorted(np.concatenate(parts).tolist()) == [0, 1, 2, 3, 4]
    assert all(len(set(rows[part].tolist())) == len(part) for part in parts)


def test_what_was_odd_before_is_discounted_in_full_only_if_proven() -> None:
    x = torch.zeros(2, 1, 2, 4)
    first, behind = hops(x, x, 0, ["1/0", "1/1"], stage=1), hops(x, x, 0, ["2/0", "2/1"], stage=2)
    cascade, passed = Cascade(), np.array([True, True])
    cascade.note(first, np.array([[30.0, 1.0], [30.0, 1.0]]), passed, proven=np.array([True, False]))
    discount = cascade.discount(behind, 2)
    assert discount.tolist() == [pytest.approx([20, 1]), pytest.approx([2, 1])]


def test_a_text_that_is_odd_to_a_head_is_odd_behind_in_every_way() -> None:
    tokens, x = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2, 4)
    for direction, behind in ((Direction.ACTIVATION, [2, 2]), (Direction.GRADIENT, [1, 2])):
        cascade = Cascade()
        end = hops(tokens, x, 0, ["0/0"], stage=0, direction=direction)
        cascade.note(end, np.array([[1.0, 30.0]]), np.array([True]), proven=np.array([False]))
        following = hops(x, x, 0, ["1/0"], stage=1, direction=direction)
        assert cascade.discount(following, 2).tolist() == [pytest.approx(behind)]


def test_only_the_same_output_of_another_peer_that_is_not_banned_is_alike() -> None:
    x = torch.randn(1, 1, 2, 4)
    refusals, refused = Refusals(), np.array([True])
    gains, nobody = np.zeros((1, 3, 5)), np.zeros(3, dtype=np.bool_)
    for row in range(2):
        refusals.note(hops(x, x, 0, [f"1/{row}"]), np.array([row]), gains, refused)
    third = hops(x, x, 0, ["1/2"])
    assert [one.row for one in refusals.alike(third, np.array([2]), nobody)[0]] == [0, 1]
    assert [one.row for one in refusals.alike(third, np.array([1]), nobody)[0]] == [0]
    banned = np.array([True, False, False])
    assert [one.row for one in refusals.alike(third, np.array([2]), banned)[0]] == [1]
    assert refusals.alike(hops(x, x + 1, 0, ["1/2"]), np.array([2]), nobody) == {}
    assert refusals.alike(hops(x, x, 1, ["1/2"]), np.array([2]), nobody) == {}


def test_agreement_tolerates_rounding_and_nothing_else() -> None:
    tensor = torch.randn(2, 16, 32)
    assert agrees(tensor, tensor.bfloat16().float())
    assert not agrees(tensor, tensor + 0.05 * torch.randn_like(tensor))
    one_token = tensor.clone()
    one_token[0, 3] = 0
    assert not agrees(one_token, tensor)
    assert not agrees(torch.full_like(tensor, torch.nan), tensor)


def test_a_number_is_compared_with_the_few_before_it_once_there_are_some() -> None:
    generator, recent = np.random.default_rng(0), Recent()
    for count in range(60):
        assert (recent.deviation(1e9, 0.0) == 0) == (count < recent.near + recent.enough)
        recent.learn(-0.2 * count + 0.1 * float(generator.standard_normal()))
    expected = -0.2 * 60
    assert abs(recent.deviation(expected, 0.0)) < 2, "a steady drift is no deviation"
    # The median of the six before it is three and a half steps back.
    assert abs(recent.deviation(expected + 3.5 * 0.2, 0.0)) < 2, "nor is its end"
    assert recent.deviation(expected + 3.0, 0.0) > 3
    assert recent.deviation(expected + 3.0, finest=10.0) < 0.5
    recent.clear()
    assert recent.deviation(1e9, 0.0) == 0
