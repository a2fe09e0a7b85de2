"""What tensors have in common by token, and what of it a guard sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from verifier.attacks import View
from verifier.by_token import ByToken
from verifier.guard import Guard, Tokens
from verifier.saboteur import parse_attack
from verifier.streams import Direction

WIDTH, VOCABULARY = 32, 50
SHAPE = (4, 64)


def taught(seed: int) -> tuple[ByToken, np.ndarray]:  # type: ignore[type-arg]
    generator = np.random.default_rng(seed)
    known, centres = ByToken(WIDTH), generator.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    for _ in range(20):
        labels = generator.integers(0, VOCABULARY, 200)
        known.learn(centres[labels], labels.tolist())
    return known, centres


@given(seed=st.integers(0, 1000), scale=st.floats(1e-9, 1e9))
def test_agreement_is_a_cosine_whatever_the_size(seed: int, scale: float) -> None:
    known, centres = taught(seed)
    labels = np.random.default_rng(seed).integers(0, VOCABULARY, 40)
    tokens = centres[labels] * np.float32(scale)
    assert known.agreement(tokens, labels.tolist()) == pytest.approx(1.0, abs=0.02)
    assert known.agreement(-tokens, labels.tolist()) == pytest.approx(-1.0, abs=0.02)
    assert abs(known.agreement(np.roll(tokens, 1, axis=0), labels.tolist())) < 0.9


def test_nothing_is_said_of_labels_that_were_never_seen_nor_of_tokens_of_nothing() -> None:
    known, labels = ByToken(WIDTH), [0, 1, 2]
    ones = np.ones((3, WIDTH), np.float32)
    assert known.agreement(ones, labels) == 0.0
    known.learn(ones, labels)
    assert known.agreement(ones, [label + ByToken.rows for label in labels]) == pytest.approx(1.0), (
        "rows are shared"
    )
    assert known.agreement(0 * ones, labels) == 0.0


@given(times=st.integers(1, 200))
def test_however_often_a_token_occurs_it_counts_once(times: int) -> None:
    known, centres = taught(0)
    labels = np.array([0] * times + [*range(1, 10)])
    vectors = centres[labels] * np.where(labels == 0, -1, 1).astype(np.float32)[:, None]
    assert known.agreement(vectors, labels.tolist()) == pytest.approx(0.8, abs=0.05)


_CENTRES = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))
_MEAN = 2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))


def sent(direction: Direction, generator: torch.Generator, part: float = 1.0) -> tuple[Tensor, Tokens]:
    """At each place a `part` that its token asks for, the rest having to do with the text alone; and labels.

    However large the part, sizes are the same. A gradient's tokens are the labels, an activation's are those before
    them. Activations have a mean, too.
    """
    text = torch.randint(0, VOCABULARY, (SHAPE[0], SHAPE[1] + 1), generator=generator)
    tokens, labels = text[:, :-1], text[:, 1:]
    centres = _CENTRES[labels if direction is Direction.GRADIENT else tokens]
    own = part * centres + (2 - part**2) ** 0.5 * torch.randn(*SHAPE, WIDTH, generator=generator)
    return own + _MEAN * (direction is Direction.ACTIVATION), labels.flatten().tolist()


def trained(direction: Direction, seed: int) -> tuple[Guard, torch.Generator]:
    guard, generator = Guard(direction, np.random.default_rng(seed)), torch.Generator().manual_seed(seed)
    for place in range(150):
        tensor, labels = sent(direction, generator)
        assert guard.check(tensor, f"peer{place % 3}", labels), place
    return guard, generator


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("attack", ["flip", "random", "random-sign:0.3", "another's"])
@pytest.mark.parametrize("direction", Direction)
def test_what_does_not_belong_to_its_tokens_is_flagged_from_the_first_one_on(
    direction: Direction, attack: str, seed: int
) -> None:
    """Of gradients the mean and the channels tell neither a flipped one nor another text's."""
    guard, generator = trained(direction, seed)
    corrupt = parse_attack("flip" if attack == "another's" else attack)(1)
    for place in range(90):
        output, labels = sent(direction, generator)
        if place % 3:
            assert guard.check(output, f"peer{place % 3}", labels), place
            continue
        view = View(direction, 1, place, place, "peer0", output, {})
        bad = sent(direction, generator)[0] if attack == "another's" else corrupt.corrupt(output, view)
        assert not guard.check(bad, "peer0", labels), place


@pytest.mark.parametrize("direction", Direction)
def test_a_single_text_may_agree_with_its_tokens_less_than_others_do(direction: Direction) -> None:
    guard, generator = trained(direction, 0)
    tensor, labels = sent(direction, generator, part=0.7)
    assert guard.check(tensor, "peer0", labels)


@pytest.mark.parametrize("direction", Direction)
def test_an_honest_stream_passes_while_its_tokens_come_to_say_less(direction: Direction) -> None:
    """As a model learns, what is left to learn is less and less the label's alone."""
    guard, generator = Guard(direction, np.random.default_rng(0)), torch.Generator().manual_seed(0)
    for place in range(600):
        tensor, labels = sent(direction, generator, part=1 - place / 900)
        guard.check(tensor, f"peer{place % 3}", labels)
    assert guard.flagged <= 0.005 * guard.checked


@pytest.mark.parametrize("direction", Direction)
def test_tokens_that_cease_to_say_anything_are_held_against_nobody_for_long(direction: Direction) -> None:
    """As when weights jump: what is not its sender's fault is soon believed again."""
    guard, generator = trained(direction, 0)
    passed = []
    for place in range(100):
        tensor, labels = sent(direction, generator)
        passed.append(guard.check(tensor, f"peer{place % 3}", [*labels[SHAPE[1] :], *labels[: SHAPE[1]]]))
    assert sum(passed) >= 90 and all(passed[40:]), passed
