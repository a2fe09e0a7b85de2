"""Every attack of the suite: its shape, what it changes, and how its SPEC is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from protocol.errors import UserError
from verifier.attacks import View
from verifier.saboteur import Orders, Saboteur, parse_attack
from verifier.streams import Direction

SPECS = [
    "zeros", "constant:3", "random", "scale:0.5", "flip", "random-sign:0.5", "delay:3", "bias:1", "adaptive-ema:0.9",
    "invisible-noise:0.99", "mixed", "noise:0.5", "drift:1", "mlp", "stale:2", "partial:0.5", "nan", "replay",
]  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def output_of(round: int) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(round)) + 0.5


def view_of(saboteur: Saboteur, round: int, stage: int = 1) -> View:
    state = saboteur.state(Direction.ACTIVATION)
    inputs = 0.9 * output_of(round)
    older = lambda versions: output_of(round - versions)  # noqa: E731
    return View(Direction.ACTIVATION, stage, round, 0, "1/0", inputs, state, older)


def sent(spec: str, rounds: int = 6, start: int = 4, seed: int = 3, duty: float = 1.0) -> list[Tensor]:
    saboteur = Saboteur(parse_attack(spec)(seed), Orders(start=start, duty=duty), seed)
    return [saboteur.send(output_of(round), view_of(saboteur, round)) for round in range(rounds)]


@pytest.mark.parametrize("spec", SPECS)
def test_an_attack_changes_its_output_from_its_start_on_and_keeps_the_shape(spec: str) -> None:
    results = sent(spec)
    for round, result in enumerate(results):
        assert result.shape == output_of(round).shape
        honest = torch.equal(result, output_of(round))
        assert honest == (round < 4)


@pytest.mark.parametrize("spec", SPECS)
def test_an_attack_does_not_write_into_the_honest_output(spec: str) -> None:
    saboteur = Saboteur(parse_attack(spec)(1), Orders(), 1)
    output = output_of(7)
    saboteur.send(output, view_of(saboteur, 7))
    assert torch.equal(output, output_of(7))


def test_colluders_corrupt_alike_and_others_do_not() -> None:
    assert torch.equal(sent("random", seed=5)[-1], sent("random", seed=5)[-1])
    assert not torch.equal(sent("random", seed=5)[-1], sent("random", seed=6)[-1])


def test_delay_sends_its_own_output_of_so_many_rounds_ago() -> None:
    assert torch.equal(sent("delay:3", rounds=8)[7], output_of(4))


def test_invisible_noise_stays_inside_the_honest_deviation() -> None:
    saboteur = Saboteur(parse_attack("invisible-noise:0.9")(0), Orders(), 0)
    output = output_of(0)
    result = saboteur.send(output, view_of(saboteur, 0))
    mean = saboteur.state(Direction.ACTIVATION)["ema"]
    assert (result - mean).abs().max() <= (output - mean).abs().max()


def test_withholding_sends_nothing_of_the_right_shape() -> None:
    assert sent("withhold:1")[-1].numel() == 0
    assert torch.equal(sent("withhold:0")[-1], output_of(5))


def test_random_sign_flips_about_the_fraction() -> None:
    saboteur = Saboteur(parse_attack("random-sign:0.3")(0), Orders(), 0)
    output = torch.ones(4, 50, 50)
    view = View(Direction.GRADIENT, 1, 0, 0, "1/0", output, saboteur.state(Direction.GRADIENT))
    assert abs((saboteur.send(output, view) < 0).float().mean().item() - 0.3) < 0.03


def test_duty_is_the_share_of_rounds_in_which_it_acts() -> None:
    saboteur = Saboteur(parse_attack("zeros")(0), Orders(duty=0.2), 9)
    acts = [saboteur.acts(Direction.ACTIVATION, round) for round in range(2000)]
    assert 0.15 < sum(acts) / 2000 < 0.25


def test_a_direction_that_is_not_attacked_is_left_alone() -> None:
    orders = Orders(directions=frozenset({Direction.GRADIENT}))
    saboteur = Saboteur(parse_attack("zeros")(0), orders, 0)
    assert torch.equal(saboteur.send(output_of(1), view_of(saboteur, 1)), output_of(1))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "nonsense",
        "zeros:1",
        "noise:x",
        "noise:nan",
        "partial:2",
        "invisible-noise:0",
        "delay:0",
        "no.py:Class",
    ],
)
def test_a_wrong_spec_says_what_to_write(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_attack(spec)
    assert caught.value.remedy


def test_the_example_attack_of_the_docs_works_with_and_without_parameters() -> None:
    spec = f"{EXAMPLES / 'my_attack.py'}:SwapHalves"
    assert torch.equal(sent(spec)[5], output_of(5).roll(4, dims=-1))
    assert torch.equal(sent(spec + ":every=2")[5], output_of(5))


def test_a_file_that_does_not_hold_an_attack_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("class A:\n    pass\nclass B:\n    def corrupt(self): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for spec in ("bad.py:A", "bad.py:Missing", "bad.py:B", "broken.py:A"):
        with pytest.raises(UserError):
            parse_attack(f"{tmp_path}/{spec}")
