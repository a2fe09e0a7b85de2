"""Who leads a round, and who has strayed, at one replica without a network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from node import rounds
from node.compute import Urgency
from node.progress import StageProgress
from node.rounds import StageRounds, Standing
from protocol import wire
from protocol.directory import PeerState
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.reports import Progress
from protocol.requests import RoundHolding, RoundOpen
from tests.swarms import small_manifest

OWN, OTHER, THIRD = PeerId("own"), PeerId("other"), PeerId("third")
DIGEST = b"d" * 32


class Compute:
    async def run(self, urgency: Urgency, function: Any, *args: Any) -> Any:
        return function(*args)


class Passes:
    """Holds a gradient of one slot at all times."""

    slots = (3,)
    trainer = SimpleNamespace(version=0)

    def take_gradient(self, keep: Any) -> None:
        keep(torch.ones(2), (3,))


@pytest.fixture
def replica() -> StageRounds:
    manifest = small_manifest()
    switchboard: Any = SimpleNamespace(host=SimpleNamespace(peer_id=OWN), methods={}, links={})
    table = StageProgress(manifest)
    passes: Any = Passes()
    compute: Any = Compute()
    made = StageRounds(
        manifest, 1, switchboard, compute, passes, table, StageProgress(manifest), lambda: None
    )
    for peer in (OWN, OTHER, THIRD):
        hear(made, peer, 0)
    return made


def hear(replica: StageRounds, peer: PeerId, version: int) -> None:
    report = Progress(1, version, DIGEST, PeerState.SERVING, (), (), (), 0)
    replica._replicas.hear(peer, report, rounds.monotonic())


def better(replica: StageRounds) -> PeerId:
    """The first of the members that is not us; the test is about being second to it."""
    return next(peer for peer in replica._replicas.members(0) if peer != OWN)


async def test_who_leads_gives_way_when_the_round_is_closed_meanwhile(
    replica: StageRounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def closed_meanwhile(peer: PeerId, version: int, attempt: int) -> RoundHolding:
        replica._turn(Standing(1, DIGEST, 4, frozenset()))
        return RoundHolding(1, (4,))

    monkeypatch.setattr(replica, "_ask_to_open", closed_meanwhile)
    await replica._lead(0)
    assert replica._running is None
    assert not replica._averagings


async def test_of_two_leaders_the_better_rank_wins(
    replica: StageRounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    link: Any = SimpleNamespace(peer=better(replica), stage=1)
    is_better = replica._replicas.members(0)[0] != OWN
    answers: list[bytes | Reason] = []

    async def opened_meanwhile(peer: PeerId, version: int, attempt: int) -> RoundHolding:
        try:
            answers.append((await replica._on_open(link, wire.encode(RoundOpen(0, 1)), memoryview(b"")))[0])
        except ProtocolError as error:
            answers.append(error.reason)
        return RoundHolding(1, (4,))

    begun: list[object] = []
    monkeypatch.setattr(replica, "_ask_to_open", opened_meanwhile)
    monkeypatch.setattr(replica, "_begin", begun.append)
    replica._left_out = {THIRD if link.peer == OTHER else OTHER}
    with monkeypatch.context() as patch:
        patch.setattr(replica, "_send_commit", opened_meanwhile)
        await replica._lead(0)
    if is_better:
        assert isinstance(answers[0], bytes) and not begun
    else:
        assert answers[0] is Reason.BUSY and len(begun) == 1


def test_who_went_on_alone_goes_back_to_what_most_hold(
    replica: StageRounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = rounds.monotonic()
    monkeypatch.setattr(rounds, "monotonic", lambda: now)
    hear(replica, OWN, 7)
    assert not replica._is_astray(7)
    monkeypatch.setattr(rounds, "monotonic", lambda: now + rounds._ASTRAY_AFTER + 0.1)
    assert replica._is_astray(7)
    # They have caught up: a round's delay is no straying.
    hear(replica, OTHER, 6)
    assert not replica._is_astray(7)


def test_a_round_waits_a_moment_for_those_who_come_from_the_one_before(
    replica: StageRounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one alone could close it in the moment in which the others' last word is of the round before."""
    now = rounds.monotonic()
    monkeypatch.setattr(rounds, "monotonic", lambda: now)
    replica._turn(Standing(1, DIGEST, 4, frozenset()))
    hear(replica, OWN, 1)
    assert not replica._are_all_here(1)
    hear(replica, OTHER, 1)
    hear(replica, THIRD, 1)
    assert replica._are_all_here(1)
    hear(replica, THIRD, 0)
    monkeypatch.setattr(rounds, "monotonic", lambda: now + rounds._PATIENCE + 0.1)
    assert replica._are_all_here(1)


def test_a_stage_that_lags_far_behind_does_not_wait(replica: StageRounds) -> None:
    """For work that cannot come any more."""
    for heads, closes in ((1, False), (2, True)):
        report = Progress(0, heads, DIGEST, PeerState.SERVING, (), (), (), 0)
        replica._heads.hear(OTHER, report, rounds.monotonic())
        assert replica._should_close(0) is closes
