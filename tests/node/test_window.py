"""A head keeps the stages busy, and little more than that under way."""

from __future__ import annotations

import heapq
from itertools import count

import pytest

from node.window import Window

SERVICE = 0.05


def simulate(delay: float, trips: int = 2000, *, is_late: bool = False) -> tuple[float, float]:
    """(share of the server's time that is used, mean in flight) of the second half, behind `delay` seconds there and
    as many back, with one server that takes `SERVICE` seconds a microbatch.

    `is_late`: every other one comes back a round late anyway.
    """
    window, order = Window(), count()
    now, free_at, in_flight, half, held = 0.0, 0.0, 0, 0.0, 0
    back: list[tuple[float, int, float]] = []
    for done in range(trips):
        while in_flight < (window.unqueued if is_late and done % 2 else window.size):
            free_at = max(free_at, now + delay) + SERVICE
            heapq.heappush(back, (free_at + delay, next(order), now))
            in_flight += 1
        now, _, began = heapq.heappop(back)
        window.note(now - began, in_flight)
        if done == trips // 2:
            half = now
        held += in_flight if done > trips // 2 else 0
        in_flight -= 1
    return (trips - trips // 2) * SERVICE / (now - half), held / (trips // 2)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.4])
def test_it_holds_what_keeps_the_server_busy_and_about_twice_that(delay: float) -> None:
    used, in_flight = simulate(delay)
    needed = (2 * delay + SERVICE) / SERVICE
    assert used > 0.97
    assert needed <= in_flight <= 2 * needed + 4


def test_late_work_does_not_queue_and_keeps_the_server_busy_behind_a_long_way() -> None:
    used, _ = simulate(0.4, is_late=True)
    assert used > 0.97
    window = Window()
    for _ in range(100):
        window.note(0.1 * window.size, window.size)
    assert window.unqueued <= 2


def test_it_begins_small_and_grows_while_nothing_queues() -> None:
    window = Window()
    assert window.size == 1
    sizes = []
    for _ in range(60):
        window.note(0.5, window.size)
        sizes.append(window.size)
    assert max(sizes) > 20


def test_it_shrinks_where_all_that_is_more_only_waits() -> None:
    window = Window()
    window.note(0.1, 1)
    for _ in range(100):
        window.note(0.1 * window.size, window.size)  # One server, no way: what is in flight queues.
    assert window.size <= 4


def test_it_follows_a_way_that_becomes_longer() -> None:
    window = Window()
    for _ in range(200):
        window.note(0.1, window.size)
    for _ in range(300):
        window.note(0.3, window.size)
    sizes = []
    for _ in range(100):
        window.note(0.3, window.size)
        sizes.append(window.size)
    assert max(sizes) > 20
