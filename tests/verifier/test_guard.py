"""The inline guard: what it lets pass, what it flags, and that it cannot be made to refuse everybody."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from verifier import features
from verifier.attacks import View
from verifier.guard import Guard
from verifier.loss_guard import LossGuard
from verifier.saboteur import parse_attack
from verifier.senders import Repeats
from verifier.streams import Direction

SHAPE = (4, 64, 32)


def honest(generator: torch.Generator, drift: float = 0.0) -> Tensor:
    """A stream with a mean of its own, whose texts differ in how loud they are, and which grows by `drift`."""
    loudness = 1 + 0.1 * torch.randn((), generator=generator)
    return (1 + drift) * (
        torch.linspace(-2, 2, SHAPE[2]) + loudness * torch.randn(SHAPE, generator=generator)
    )


def taught(count: int = 200, seed: int = 0) -> tuple[Guard, torch.Generator]:
    guard = Guard(Direction.ACTIVATION, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    for place in range(count):
        guard.check(honest(generator), f"peer{place % 3}")
    return guard, generator


def test_its_statistics_are_those_of_the_core() -> None:
    guard, generator = taught()
    tensor = honest(generator)
    assert guard._places is not None and guard._mean is not None
    seen = tensor[:, guard._places]
    expected = features.marginal_distances(
        seen[None], torch.from_numpy(guard._mean), features.projections(SHAPE[2])
    )
    values = guard._measure(guard._look(tensor), None)
    assert values is not None
    assert values.distances == pytest.approx(features.log_marginal(expected)[0], abs=1e-4)


def test_honest_streams_pass_while_training_changes_them() -> None:
    guard, generator = taught(0)
    for place in range(2000):
        guard.check(honest(generator, drift=place / 1000), f"peer{place % 3}")
    assert guard.flagged <= 0.005 * guard.checked


@pytest.mark.parametrize(
    ("attack", "seed"),
    [("scale", 0), *product(("zeros", "constant:1", "random", "flip", "scale:3", "nan"), range(4))],
)
def test_gross_corruption_is_flagged(attack: str, seed: int) -> None:
    guard, generator = taught(seed=seed)
    output = honest(generator)
    view = View(Direction.ACTIVATION, 1, 3, 7, "peer0", output, {})
    corrupt = parse_attack(attack)(1).corrupt(output, view)
    if attack == "nan":
        corrupt[:] = torch.nan  # One element may be at a place that it does not look at.
    assert not guard.check(corrupt, "peer0")
    assert guard.check(output, "peer1")


WIDTH = 160
_COMMON = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))


def without_mean(generator: torch.Generator) -> Tensor:
    """A stream that has no mean, but channels that have much in common."""
    parts = torch.randn(4, 64, len(_COMMON), generator=generator) * torch.arange(1, len(_COMMON) + 1)
    return 0.01 * (parts @ _COMMON + 2 * torch.randn(4, 64, WIDTH, generator=generator))


@pytest.mark.parametrize("attack", ["random", "random-sign:0.3", "random-sign:0.5", "invisible-noise:0.99"])
def test_what_channels_have_in_common_tells_noise_of_the_right_size(attack: str) -> None:
    """Without any tokens to compare with."""
    direction = Direction.ACTIVATION
    for seed in range(4):
        guard = Guard(direction, np.random.default_rng(seed))
        generator = torch.Generator().manual_seed(seed)
        corrupt = parse_attack(attack)(1)
        passed = [guard.check(without_mean(generator), f"peer{place % 3}") for place in range(150)]
        assert sum(passed) >= 149
        bad = []
        for place in range(60):
            output = without_mean(generator)
            if place % 3 == 0:
                output = corrupt.corrupt(output, View(direction, 1, place, place, "peer0", output, {}))
            (bad if place % 3 == 0 else passed).append(guard.check(output, f"peer{place % 3}"))
        assert not any(bad[2:]), f"seed {seed}: {bad}"
        assert sum(passed) >= len(passed) - 1


@pytest.mark.parametrize("seed", range(5))
def test_channels_that_cease_to_have_as_much_in_common_are_held_against_nobody(seed: int) -> None:
    """As when weights jump: tokens that were all along one direction are no more, whoever sends them."""
    guard, generator = (
        Guard(Direction.ACTIVATION, np.random.default_rng(seed)),
        torch.Generator().manual_seed(seed),
    )
    along = torch.randn(WIDTH, generator=generator)

    def tensor(rest: float) -> Tensor:
        # As loud as it likes, so that sizes say nothing.
        loudness = torch.exp(torch.randn((), generator=generator))
        signs = torch.randn(4, 64, 1, generator=generator)
        return loudness * (signs * along + rest * torch.randn(4, 64, WIDTH, generator=generator))

    for place in range(100):
        guard.check(tensor(0.1), f"peer{place % 3}")
    assert guard.flagged == 0
    passed = [guard.check(tensor(1.0), f"peer{place % 3}") for place in range(100)]
    assert sum(passed) >= 97, passed


def test_what_lies_across_the_mean_is_flagged_though_the_mean_is_small() -> None:
    guard, generator = Guard(Direction.ACTIVATION, np.random.default_rng(0)), torch.Generator().manual_seed(0)
    mean = 0.5 * torch.randn(64, WIDTH, generator=generator)
    tensors = [mean + torch.randn(4, 64, WIDTH, generator=generator) for _ in range(200)]
    assert all(guard.check(one, f"peer{place % 3}") for place, one in enumerate(tensors))
    assert not guard.check(-tensors[0], "peer0")
    assert not guard.check(tensors[0] - 2 * mean, "peer1")


def test_an_attacker_among_three_does_not_move_it() -> None:
    guard, generator = taught()
    for place in range(600):
        tensor = honest(generator)
        passed = guard.check(-tensor if place % 3 == 0 else tensor, f"peer{place % 3}")
        assert not (passed and place % 3 == 0)
    assert guard.flagged >= 200
    assert guard.flagged <= 200 + 0.005 * 400 + 1


def test_it_follows_a_stream_that_changed_as_a_whole() -> None:
    guard, generator = taught()
    passed = [guard.check(5 * honest(generator), f"peer{place % 3}") for place in range(200)]
    assert not passed[0]
    assert all(passed[40:])


@pytest.mark.parametrize("senders", [1, 2, 3])
def test_however_few_senders_there_are_few_tensors_are_flagged_before_it_follows(senders: int) -> None:
    guard, generator = taught()
    for place in range(24):
        assert guard.check(honest(generator), f"peer{place % senders}")
    passed = [guard.check(5 * honest(generator), f"peer{place % senders}") for place in range(100)]
    assert not passed[0] and all(passed[15:]), passed
    if senders == 1:
        assert all(passed[5:]), passed


@pytest.mark.parametrize(("silence", "passes"), [(30, False), (200, True)])
def test_what_is_usual_is_out_of_date_after_a_silence_longer_than_all_that_is_remembered(
    silence: int, passes: bool
) -> None:
    guard, generator = taught(0)
    for place in range(100):
        assert guard.check(honest(generator), f"peer{place % 3}", version=place * 4)
    last = 99 * 4
    passed = [
        guard.check(5 * honest(generator), f"peer{place % 3}", version=last + silence + place)
        for place in range(20)
    ]
    assert all(passed) if passes else not any(passed[:10])


def test_it_knows_whether_it_hears_of_one_sender_only() -> None:
    guard, generator = taught()
    assert not guard.hears_only("peer0")
    for _ in range(24):
        guard.check(honest(generator), "peer0")
    assert guard.hears_only("peer0") and not guard.hears_only("peer1")


def test_receivers_look_at_different_places() -> None:
    places = [taught(1, seed)[0]._places for seed in range(5)]
    assert all(place is not None for place in places)
    assert len({tuple(place.tolist()) for place in places if place is not None}) == 5


def losses(generator: np.random.Generator, step: int) -> float:
    """Of microbatches of a run that learns."""
    return 3.0 + 3.0 * 0.98**step + 0.2 * float(generator.standard_normal())


def test_losses_of_an_honest_run_pass() -> None:
    for seed in range(5):
        generator, guard = np.random.default_rng(seed), LossGuard()
        passed = [guard.check(losses(generator, step), f"peer{step % 3}") for step in range(600)]
        assert np.mean(passed) >= 0.995


def test_the_sender_whose_activations_cost_loss_is_flagged_soon_and_nobody_else() -> None:
    generator, guard = np.random.default_rng(0), LossGuard()
    flagged: dict[str, list[int]] = {"peer0": [], "peer1": [], "peer2": []}
    for step in range(300):
        sender = f"peer{step % 3}"
        is_bad = sender == "peer0" and 150 <= step < 240
        if not guard.check(losses(generator, step) + 0.7 * is_bad, sender):
            flagged[sender].append(step)
    assert not flagged["peer1"] and not flagged["peer2"]
    assert 150 <= flagged["peer0"][0] <= 168, "within six of its microbatches"
    assert len([step for step in flagged["peer0"] if step < 240]) >= 20
    assert flagged["peer0"][-1] < 290, "believed again once it has mended"


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_that_slows_down_is_held_against_nobody(seed: int) -> None:
    """Not even where one sender sends nearly everything, so that no other one is seen to do the same."""
    generator, guard = np.random.default_rng(seed), LossGuard()
    for step in range(100):
        loss = max(3.5, 6.2 - 0.18 * step) + 0.15 * float(generator.standard_normal())
        assert guard.check(loss, f"peer{step % 8 == 0}"), step


def test_a_loss_that_falls_fast_hides_nobody() -> None:
    """In a run's first rounds losses fall by more than texts differ."""
    generator, guard = np.random.default_rng(0), LossGuard()
    flagged = []
    for step in range(60):
        loss = 3.2 + 3.0 * 0.93**step + 0.2 * float(generator.standard_normal())
        is_bad = step >= 30 and step % 3 == 0
        if not guard.check(loss + 0.9 * is_bad, f"peer{step % 3}"):
            flagged.append(step)
    assert flagged and flagged[0] <= 42, "within five of its microbatches"
    assert all(step % 3 == 0 for step in flagged)


def test_losses_that_rise_for_everybody_do_not_end_the_run() -> None:
    generator, guard = np.random.default_rng(0), LossGuard()
    for step in range(200):
        guard.check(losses(generator, step), f"peer{step % 3}")
    passed = [guard.check(losses(generator, 200) + 2.0, f"peer{step % 3}") for step in range(200)]
    assert all(passed[80:])


def test_losses_that_rise_are_not_held_against_a_sender_that_is_alone() -> None:
    generator, guard = np.random.default_rng(0), LossGuard()
    for step in range(200):
        assert guard.check(losses(generator, step) + 2.0 * (step >= 100), "peer0"), step


def test_it_remembers_a_bounded_number_of_senders() -> None:
    guard = LossGuard()
    for step in range(2000):
        guard.check(3.0 + step % 7 / 10, f"peer{step}")
    assert len(guard._sums) <= 256


def test_one_hard_text_is_not_held_against_its_sender_however_hard() -> None:
    generator, guard = np.random.default_rng(0), LossGuard()
    for step in range(200):
        guard.check(losses(generator, step), f"peer{step % 3}")
    assert guard.check(60.0, "peer0")
    assert not guard.check(60.0, "peer0"), "twice in a row is no chance"
    assert guard.check(losses(generator, 200), "peer0"), "what is not odd itself does no harm"
    assert not guard.check(60.0, "peer0", is_retry=True)
    assert guard.check(losses(generator, 200), "peer0", is_retry=True)


def test_a_hard_text_that_comes_again_is_not_held_against_its_sender() -> None:
    generator, guard = np.random.default_rng(0), LossGuard()
    for step in range(200):
        guard.check(losses(generator, step), f"peer{step % 3}")
    for _ in range(20):
        assert guard.check(6.0, "peer0", is_retry=True)
    assert guard.check(losses(generator, 200), "peer0")


def test_the_same_tensor_of_another_input_is_a_repeat_of_its_sender_alone() -> None:
    repeats = Repeats()
    assert repeats.judged("a", 1, b"one", 1) is None
    repeats.note("a", 1, b"one", 1, may_be_used=True)
    assert repeats.judged("a", 1, b"two", 1) is False
    assert repeats.judged("b", 1, b"two", 1) is None, "what another sent first says nothing of this one"


@pytest.mark.parametrize("may_be_used", [True, False])
def test_what_is_sent_again_for_its_slot_is_answered_as_before(may_be_used: bool) -> None:
    repeats = Repeats()
    repeats.note("a", 1, b"one", 1, may_be_used=may_be_used)
    assert repeats.judged("a", 1, b"one", 1) is may_be_used
    assert repeats.judged("a", 1, b"one", 2) is None, "of another slot it is judged by that one's tokens"


def test_what_was_sent_long_ago_is_forgotten() -> None:
    repeats = Repeats()
    for number in range(5000):
        repeats.note("a", number, b"one", number, may_be_used=True)
    assert repeats.judged("a", 0, b"two", 0) is None
    assert repeats.judged("a", 4999, b"two", 4999) is False
    assert len(repeats._known) <= 4096
