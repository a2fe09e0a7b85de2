"""The offline measurement of the guards: deals a real run's tensors, and tells lies from them."""

from __future__ import annotations

from benchmarks.guards import measure, summarise
from tests.swarms import small_manifest


def test_what_is_flagged_of_whom_is_counted_apart() -> None:
    found = summarise(
        measure(small_manifest(rounds=14), ["zeros", "flip", "bias:0.001"], dealings=2, start=8)
    )
    assert found["honest"]["loss"]["sent"] < found["honest"]["activation"]["sent"]
    assert found["without_attacker"] == {
        "dealings": 2,
        "flagged_fraction": 0.0,
        "worst_flagged_fraction": 0.0,
    }
    lies = {(one["attack"], one["direction"]): one for one in found["attacks"]}
    assert len(lies) == 6 and all(one["sent"] > 0 for one in lies.values())
    for direction in ("activation", "gradient"):
        zeros = lies["zeros", direction]
        assert (zeros["share"], zeros["passed_first"], zeros["never"]) == (1.0, 0.0, 0)
    flipped = lies["flip", "gradient"]
    assert flipped["never"] == 0 and 0 < flipped["passed_first"] < flipped["sent"] / 2
    slight = lies["bias:0.001", "gradient"]
    assert slight["never"] == 2 and slight["passed_first"] == slight["sent"] / 2
