"""Work is shared in proportion to throughput, and interleaved."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.routing import Router
from protocol.identity import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def measured(**seconds: float) -> Router:
    router = Router()
    router.choose([PeerId(name) for name in seconds])
    for name, one in seconds.items():
        router.forget(PeerId(name))
        router.measure(PeerId(name), one)
    return router


def test_without_candidates_there_is_no_choice() -> None:
    assert Router().choose([]) is None


def test_equal_replicas_take_turns() -> None:
    router = Router()
    assert [router.choose([A, B, C]) for _ in range(6)] == [A, B, C, A, B, C]


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=5))
@settings(max_examples=30)
def test_shares_are_in_proportion_to_throughput(seconds: list[float]) -> None:
    names = [PeerId(f"{number}") for number in range(len(seconds))]
    router = Router()
    for name, one in zip(names, seconds, strict=True):
        router.measure(name, one)
    turns = 600
    chosen = Counter(router.choose(names) for _ in range(turns))
    total = sum(1 / one for one in seconds)
    for name, one in zip(names, seconds, strict=True):
        assert chosen[name] == pytest.approx(turns / one / total, abs=1 + len(seconds))


def test_the_slow_one_is_interleaved_and_not_bunched() -> None:
    router = measured(a=1.0, b=3.0)
    turns = "".join(str(router.choose([A, B])) for _ in range(40))
    assert "bb" not in turns and "aaaaa" not in turns


def test_a_newcomer_is_not_flooded() -> None:
    router = measured(a=1.0, b=1.0)
    for _ in range(100):
        router.choose([A, B])
    chosen = Counter(router.choose([A, B, C]) for _ in range(30))
    assert chosen[C] <= 12


def test_who_cannot_take_one_now_is_passed_over() -> None:
    router = measured(a=1.0, b=1.0)
    assert {router.choose([B]) for _ in range(5)} == {B}


def test_an_unmeasured_replica_counts_as_average() -> None:
    router = measured(a=1.0, b=3.0)
    assert router.service_time(C) == pytest.approx(2.0)


@pytest.mark.parametrize("seconds", [1e-3, 0.03, 20.0])
def test_whoever_was_chosen_before_anything_was_measured_gets_its_share_all_the_same(seconds: float) -> None:
    router = Router()
    assert router.choose([A, B, C]) == A
    router.measure(A, seconds)
    chosen = Counter(router.choose([A, B, C]) for _ in range(9))
    assert chosen[A] >= 2 and max(chosen.values()) <= 4


def test_when_all_who_were_measured_have_left_the_others_are_charged_what_they_took() -> None:
    router = measured(a=0.03)
    router.choose([A, B])
    router.forget(A)
    assert router.service_time(B) == pytest.approx(0.03)


def test_measurements_are_smoothed() -> None:
    router = measured(a=1.0)
    router.measure(A, 11.0)
    assert 1.0 < router.service_time(A) < 11.0
    for _ in range(50):
        router.measure(A, 11.0)
    assert router.service_time(A) == pytest.approx(11.0, rel=0.01)


def test_the_forgotten_takes_no_memory() -> None:
    router = measured(a=1.0, b=2.0)
    router.forget(A)
    router.forget(C)
    assert list(router._lanes) == [B]
