"""How long a sender waits, and whom it leaves alone after it waited in vain."""

from __future__ import annotations

import pytest

from node import patience
from node.patience import FLIGHT_TIMEOUT, Patience

A, B = "a", "b"


def experienced(hops: int = 2, trip: float = 0.1) -> Patience:
    """It knows what is usual."""
    sender = Patience(hops)
    for _ in range(patience._ENOUGH):
        sender.note(trip)
    return sender


def test_who_knows_nothing_yet_waits_as_long_as_anybody_may() -> None:
    sender = Patience(2)
    for _ in range(patience._ENOUGH - 1):
        sender.note(0.1)
        assert sender.limit(0) == FLIGHT_TIMEOUT


def test_it_waits_some_times_longer_than_is_usual() -> None:
    assert experienced(trip=4.0).limit(0) == 40.0
    assert experienced(trip=30.0).limit(0) == FLIGHT_TIMEOUT


def test_what_few_take_long_for_changes_nothing() -> None:
    sender = experienced(trip=1.0)
    before = sender.limit(0)
    for number in range(10 * patience._REMEMBERED):
        sender.note(59.0 if number % 3 == 0 else 1.0)
    assert sender.limit(0) == before


def test_the_one_next_to_the_culprit_gives_up_first() -> None:
    limits = [experienced(hops).limit(0) for hops in (15, 2, 1)]
    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == 3


def test_it_waits_longer_for_what_was_lost_before() -> None:
    limits = [experienced().limit(attempt) for attempt in range(16)]
    assert limits[:3] == [limits[0], 2 * limits[0], 4 * limits[0]]
    assert limits[-1] == FLIGHT_TIMEOUT
    # A stage may be without anybody for minutes before a slot has been lost too often.
    assert sum(limits) > 10 * FLIGHT_TIMEOUT


def test_who_lets_it_wait_is_shunned_twice_as_long_each_time() -> None:
    sender, now = experienced(), 0.0
    for time in range(4):
        assert not sender.shuns(A, now)
        sender.lost(A, now)
        end = now + patience._SHUNNED_FOR * 2**time
        assert sender.shuns(A, end - 1) and not sender.shuns(A, end)
        now = end
    assert not sender.shuns(B, 0.0)


def test_it_can_say_whom_it_shuns() -> None:
    sender = experienced()
    assert sender.shunned(0.0) == []
    sender.lost(B, 0.0)
    sender.lost(A, 5.0)
    assert sender.shunned(6.0) == [B, A]
    assert sender.shunned(patience._SHUNNED_FOR) == [A]


def test_what_is_lost_together_counts_once() -> None:
    sender = experienced()
    for late in (0.0, 0.5, 1.0):
        sender.lost(A, late)
    assert not sender.shuns(A, patience._SHUNNED_FOR)


def test_nobody_is_shunned_for_ever_and_long_ago_is_forgiven() -> None:
    sender, now = experienced(), 0.0
    for _ in range(20):
        sender.lost(A, now)
        now += patience._SHUNNED_AT_MOST
        assert not sender.shuns(A, now)
    now += patience._FORGIVEN_AFTER
    sender.lost(A, now)
    assert not sender.shuns(A, now + patience._SHUNNED_FOR)


def test_new_names_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_MAX_PEERS", 3)
    sender = experienced()
    for number in range(5):
        sender.lost(str(number), float(number))
    assert [sender.shuns(str(number), 5.0) for number in range(5)] == [False, False, True, True, True]
