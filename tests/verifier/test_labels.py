"""What gradients have in common by label, and what of it a guard sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from verifier.attacks import View
from verifier.guard import Guard
from verifier.labels import ByLabel, Labels
from verifier.saboteur import parse_attack
from verifier.streams import Direction

WIDTH, VOCABULARY = 32, 50
SHAPE = (4, 64)


def taught(seed: int) -> tuple[ByLabel, np.ndarray]:  # type: ignore[type-arg]
    generator = np.random.default_rng(seed)
    known, centres = ByLabel(WIDTH), generator.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    for _ in range(20):
        labels = generator.integers(0, VOCABULARY, 200)
        known.learn(centres[labels], labels)
    return known, centres


@given(seed=st.integers(0, 1000), scale=st.floats(1e-9, 1e9))
def test_agreement_is_a_cosine_whatever_the_size(seed: int, scale: float) -> None:
    known, centres = taught(seed)
    labels = np.random.default_rng(seed).integers(0, VOCABULARY, 40)
    tokens = centres[labels] * np.float32(scale)
    assert known.agreement(tokens, labels) == pytest.approx(1.0, abs=0.02)
    assert known.agreement(-tokens, labels) == pytest.approx(-1.0, abs=0.02)
    assert abs(known.agreement(np.roll(tokens, 1, axis=0), labels)) < 0.9


def test_nothing_is_said_of_labels_that_were_never_seen_nor_of_tokens_of_nothing() -> None:
    known, labels = ByLabel(WIDTH), np.arange(3)
    ones = np.ones((3, WIDTH), np.float32)
    assert known.agreement(ones, labels) == 0.0
    known.learn(ones, labels)
    assert known.agreement(ones, labels + ByLabel.rows) == pytest.approx(1.0), "rows are shared"
    assert known.agreement(0 * ones, labels) == 0.0


_CENTRES = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))


def gradient(generator: torch.Generator) -> tuple[Tensor, Labels]:
    """At each token what its label asks for, and as much that has to do with the text alone."""
    labels = torch.randint(0, VOCABULARY, SHAPE, generator=generator)
    return _CENTRES[labels] + torch.randn(*SHAPE, WIDTH, generator=generator), labels.numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("attack", ["flip", "random", "random-sign:0.3", "another's"])
def test_a_gradient_that_does_not_answer_its_labels_is_flagged(attack: str, seed: int) -> None:
    """Its mean and its channels alone tell neither a flipped one nor another text's."""
    guard = Guard(Direction.GRADIENT, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    for place in range(150):
        assert guard.check(*_sent(generator, f"peer{place % 3}"))
    corrupt = parse_attack("flip" if attack == "another's" else attack)(1)
    bad = []
    for place in range(90):
        output, labels = gradient(generator)
        if place % 3:
            assert guard.check(output, f"peer{place % 3}", labels), place
            continue
        view = View(Direction.GRADIENT, 1, place, place, "peer0", output, {})
        sent = gradient(generator)[0] if attack == "another's" else corrupt.corrupt(output, view)
        bad.append(guard.check(sent, "peer0", labels))
    assert not any(bad[3:]), bad


def _sent(generator: torch.Generator, sender: str) -> tuple[Tensor, str, Labels]:
    output, labels = gradient(generator)
    return output, sender, labels


def test_an_honest_gradient_passes_while_its_labels_come_to_say_less() -> None:
    """As a model learns, what is left to learn is less and less the label's alone."""
    guard, generator = Guard(Direction.GRADIENT, np.random.default_rng(0)), torch.Generator().manual_seed(0)
    for place in range(600):
        output, labels = gradient(generator)
        output = output + place / 300 * torch.randn(output.shape, generator=generator)
        guard.check(output, f"peer{place % 3}", labels)
    assert guard.flagged <= 0.005 * guard.checked
