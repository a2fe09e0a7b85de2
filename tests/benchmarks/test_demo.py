"""What the demo makes of what it hears."""

from __future__ import annotations

from typing import Any, cast

import pytest

from benchmarks.demo import DemoView
from benchmarks.live import tiny


def view(closed_at: list[float]) -> DemoView:
    return DemoView(tiny(0, 60), cast(Any, None), cast(Any, None), 0.0, closed_at=closed_at)


def test_speed_is_that_of_the_rounds_however_late_one_hears_of_them() -> None:
    batch = tiny(0, 60).batch
    tokens = batch.microbatches * batch.sequences * batch.context
    true = [0.5 * number for number in range(60)]
    assert view(true).tokens_per_second == pytest.approx(tokens / 0.5)
    # By reports once a second, of which the first comes at once and the last late.
    heard = [true[0], *(float(int(at) + 1) for at in true[1:])]
    assert view(heard).tokens_per_second == pytest.approx(tokens / 0.5, rel=0.01)


def test_there_is_no_speed_before_two_rounds_are_known() -> None:
    assert [view(known).tokens_per_second for known in ([], [1.0], [1.0, 1.0])] == [0.0, 0.0, 0.0]
