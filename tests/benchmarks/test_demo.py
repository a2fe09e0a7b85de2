"""What the demo makes of what it hears."""

from __future__ import annotations

from statistics import linear_regression

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo import Pace


def pace_of(reports: list[tuple[float, int]]) -> Pace:
    pace = Pace()
    for at, version in reports:
        pace.note(at, version)
    return pace


def test_speed_is_that_of_the_rounds_whenever_nodes_report() -> None:
    """Nine nodes once a second, each at a moment of its own, while a round takes 0.43 s."""
    reports = [
        (second + node / 9, int((second + node / 9) / 0.43)) for second in range(25) for node in range(9)
    ]
    assert pace_of(reports).rounds_per_second == pytest.approx(1 / 0.43, rel=0.003)


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(0, 10_000)), min_size=2, max_size=50))
def test_the_line_is_that_of_the_library(reports: list[tuple[float, int]]) -> None:
    times, versions = zip(*reports, strict=True)
    if max(times) - min(times) < 1.0:
        return
    expected = linear_regression(times, versions).slope
    assert pace_of(reports).rounds_per_second == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_there_is_no_speed_before_two_moments_are_known() -> None:
    assert [pace_of(known).rounds_per_second for known in ([], [(1.0, 1)], [(1.0, 1), (1.0, 2)])] == [0.0] * 3
