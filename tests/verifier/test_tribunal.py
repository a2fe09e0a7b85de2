"""Hearings: who is found guilty, who is not, and what one liar can do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId
from protocol.receipts import Direction
from tests.verifier.exhibits import HEADER, Trip
from verifier.exhibits import Work, works_of
from verifier.tribunal import Answer, Finding, hear

OURS, THEIRS = b"stage ok", b"strayed!"


def work(tensor: Tensor) -> Work:
    """Stage 1's activation."""
    trip = Trip()
    trip.send(1, 2, Direction.ACTIVATION, tensor=tensor.expand(HEADER.shape))
    trip.send(2, 1, Direction.GRADIENT, made_of=trip.output_digest(2, Direction.ACTIVATION))
    works, _ = works_of(trip.show_all(), 3, 0, {})
    return next(one for one in works if one.stage == 1 and one.direction is Direction.ACTIVATION)


RIGHT = torch.randn(1, *HEADER.shape[1:], generator=torch.Generator().manual_seed(1))
WRONG = torch.flip(RIGHT, (1,))


async def try_work(
    sent: Tensor, answers: Sequence[Answer | None], seed: int = 0
) -> tuple[Finding, list[PeerId]]:
    """The finding, and the witnesses in the order of `answers`; None does not answer."""
    witnesses = [Identity.generate().peer_id for _ in answers]

    async def redo(witness: PeerId, asked: Work) -> Answer:
        answer = answers[witnesses.index(witness)]
        if answer is None:
            raise ProtocolError(Reason.BUSY)
        return answer

    return await hear(work(sent), witnesses, redo, random.Random(seed)), witnesses


@pytest.mark.parametrize("seed", range(4))
async def test_two_who_agree_with_each_other_convict(seed: int) -> None:
    finding, _ = await try_work(WRONG, [Answer(RIGHT, OURS)] * 2, seed)
    assert finding.guilty is True and finding.asked == 2 and finding.state == OURS
    assert finding.difference > 1


async def test_one_confirmation_is_enough() -> None:
    noise = 1e-4 * torch.randn_like(RIGHT)
    finding, _ = await try_work(RIGHT + noise, [Answer(RIGHT, OURS)] * 4)
    assert finding.guilty is False and finding.asked == 1


@pytest.mark.parametrize("seed", range(4))
async def test_one_liar_of_two_convicts_nobody_and_is_named(seed: int) -> None:
    finding, witnesses = await try_work(RIGHT, [Answer(WRONG, OURS), Answer(RIGHT, OURS)], seed)
    assert finding.guilty is False
    assert set(finding.liars) <= {witnesses[0]}
    assert finding.liars or finding.asked == 1


async def test_liars_who_do_not_say_the_same_convict_nobody() -> None:
    lies = [Answer(WRONG, OURS), Answer(-RIGHT, OURS)]
    finding, _ = await try_work(RIGHT, lies)
    assert finding.guilty is None and not finding.liars


async def test_one_witness_is_not_enough() -> None:
    finding, _ = await try_work(WRONG, [Answer(RIGHT, OURS)])
    assert finding.guilty is None


async def test_silence_counts_neither_way() -> None:
    finding, _ = await try_work(WRONG, [None, Answer(RIGHT, OURS), None, Answer(RIGHT, OURS)])
    assert finding.guilty is None and finding.asked == 2  # Three of four would be a majority of the stage.


async def test_a_witness_with_other_weights_is_no_liar() -> None:
    for seed in range(4):
        finding, _ = await try_work(RIGHT, [Answer(WRONG, THEIRS), Answer(RIGHT, OURS)], seed)
        assert finding.guilty is False and not finding.liars


async def test_what_is_not_finite_is_guilty() -> None:
    finding, _ = await try_work(torch.full_like(RIGHT, torch.nan), [Answer(RIGHT, OURS)] * 2)
    assert finding.guilty is True and finding.difference == float("inf")


@pytest.mark.parametrize("labels", [b"other labels", b""])
async def test_a_right_tensor_with_wrong_labels_is_guilty(labels: bytes) -> None:
    finding, _ = await try_work(RIGHT, [Answer(RIGHT, OURS, labels)] * 2)
    assert finding.guilty is True and finding.is_relabelled and finding.difference == 0.0


async def test_labels_that_a_lying_witness_makes_up_convict_nobody() -> None:
    own = bytes(work(RIGHT).output.labels)
    for seed in range(4):
        lies = [Answer(RIGHT, OURS, b"other labels"), Answer(RIGHT, OURS, own)]
        finding, witnesses = await try_work(RIGHT, lies, seed)
        assert finding.guilty is False and set(finding.liars) <= {witnesses[0]}
