"""What follows from reports: when a round ends, whose slot is whose, who leads, which state is the stage's."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.progress import LIVE_FOR, StageProgress, next_slot, still_settled
from protocol.directory import PeerState
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId
from protocol.reports import Progress
from protocol.requests import MAX_ROSTER
from tests.swarms import small_manifest

A, B, C, D = sorted(Identity.generate().peer_id for _ in range(4))
M = 4
"""Microbatches a round, of `small_manifest`."""


def report(
    version: int = 0,
    *,
    slots: Iterable[int] = (),
    in_flight: Iterable[int] = (),
    settled: Iterable[int] = (),
    state: PeerState = PeerState.SERVING,
    digest: bytes = b"d" * 32,
    averaged: int | None = None,
) -> Progress:
    gone = version * M if averaged is None else averaged
    return Progress(0, version, digest, state, tuple(slots), tuple(in_flight), tuple(settled), gone)


def stage(kind: str = "synchronous", /, rounds: int = 20, **reports: Progress) -> StageProgress:
    progress = StageProgress(small_manifest(kind=kind, rounds=rounds))
    for name, one in reports.items():
        progress.hear({"a": A, "b": B, "c": C, "d": D}[name], one, 0.0)
    return progress


# --- closing ---


def test_a_synchronous_round_ends_with_its_own_slots() -> None:
    assert not stage(a=report(slots=[0, 1]), b=report(slots=[2])).is_round_full(0)
    assert stage(a=report(slots=[0, 1]), b=report(slots=[2, 3])).is_round_full(0)
    assert not stage(a=report(slots=[0, 1, 2, 4])).is_round_full(0)
    assert not stage(a=report(slots=[0, 1, 2, 2])).is_round_full(0)
    assert stage(a=report(1, slots=range(4, 8))).is_round_full(1)


def test_an_overlapped_round_ends_with_as_many_gradients() -> None:
    assert not stage("overlapped", a=report(slots=[0, 9]), b=report(slots=[5])).is_round_full(0)
    assert stage("overlapped", a=report(slots=[0, 9]), b=report(slots=[5, 6])).is_round_full(0)
    # What an earlier round had too much, this one needs less.
    assert stage("overlapped", a=report(1, slots=[7, 8], averaged=M + 2)).is_round_full(1)


@given(st.sets(st.integers(0, 20)), st.integers(0, 4))
@settings(max_examples=60)
def test_a_synchronous_round_misses_each_of_its_slots(slots: set[int], version: int) -> None:
    of_round = range(version * M, version * M + M)
    assert stage(a=report(version, slots=slots)).missing(version) == sum(
        slot not in slots for slot in of_round
    )


def test_an_overlapped_round_misses_a_number_of_gradients() -> None:
    assert stage("overlapped", a=report(slots=[0, 9]), b=report(slots=[5])).missing(0) == M - 3
    assert stage("overlapped", a=report(slots=range(M + 3))).missing(0) == 0


def test_a_replica_that_joins_or_left_has_no_part() -> None:
    progress = stage(a=report(slots=[0, 1, 2]), b=report(slots=[3], state=PeerState.JOINING))
    assert not progress.is_round_full(0)
    assert progress.members(0) == [A]
    progress.hear(B, report(slots=[3], state=PeerState.LEFT), 0.0)
    assert not progress.is_round_full(0)
    progress.hear(B, report(slots=[3], state=PeerState.LEAVING), 0.0)
    assert progress.is_round_full(0)


def test_the_slots_of_a_dead_replica_are_open_again() -> None:
    progress = stage(a=report(slots=[0, 1]), b=report(slots=[2, 3]))
    assert progress.covered() == {0, 1, 2, 3}
    progress.hear(A, report(slots=[0, 1]), LIVE_FOR)
    progress.prune(LIVE_FOR + 0.1)
    assert progress.covered() == {0, 1}
    assert list(progress.replicas()) == [A]
    progress.forget(A)
    assert progress.covered() == set()


def test_settled_slots_are_remembered_for_a_few_rounds() -> None:
    assert still_settled(range(40), 10, M) == frozenset(range(28, 40))


# --- slots of heads ---


def test_heads_share_the_slots_by_rank() -> None:
    heads = stage(a=report(), b=report())
    assert [next_slot(heads, A, 0, set()), next_slot(heads, B, 0, set())] == [0, 1]
    assert [next_slot(heads, A, 0, {0}), next_slot(heads, B, 0, {1})] == [2, 3]
    assert next_slot(heads, A, 0, {0, 2}) is None


@given(st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=30)
def test_every_slot_of_a_round_has_exactly_one_head(count: int, version: int) -> None:
    peers = [A, B, C, D][:count]
    heads = StageProgress(small_manifest())
    for peer in peers:
        heads.hear(peer, report(version), 0.0)
    drawn: list[int] = []
    for peer in peers:
        taken: set[int] = set()
        while (slot := next_slot(heads, peer, version, taken)) is not None:
            taken.add(slot)
        drawn += taken
    assert sorted(drawn) == list(range(version * M, (version + 1) * M))


def test_slots_of_a_dead_head_pass_to_the_others() -> None:
    heads = stage(a=report(in_flight=[0, 2]), b=report(slots=[1, 3]))
    assert next_slot(heads, B, 0, {1, 3}) is None
    heads.forget(A)
    assert next_slot(heads, B, 0, {1, 3}) == 0


def test_slots_in_flight_elsewhere_are_left_alone_whoever_owns_them() -> None:
    """A third head changes the ranks; what is under way stays where it is."""
    heads = stage(a=report(in_flight=[0]), b=report(in_flight=[1]), c=report())
    assert next_slot(heads, A, 0, {0}) == 3
    assert next_slot(heads, B, 0, {1}) is None
    assert next_slot(heads, C, 0, set()) == 2


def test_a_head_that_leaves_draws_no_more() -> None:
    heads = stage(a=report(state=PeerState.LEAVING), b=report())
    assert next_slot(heads, B, 0, set()) == 0


@pytest.mark.parametrize("kind, last", [("synchronous", M), ("overlapped", 3 * M)])
def test_heads_run_ahead_in_the_overlapped_schedule_only(kind: str, last: int) -> None:
    heads = stage(kind, a=report())
    assert next_slot(heads, A, 0, set(range(last - 1))) == last - 1
    assert next_slot(heads, A, 0, set(range(last))) is None


def test_no_slot_is_beyond_the_run() -> None:
    rounds = small_manifest().schedule.rounds
    heads = stage("overlapped", a=report(rounds - 1))
    assert next_slot(heads, A, rounds - 1, set(range(rounds * M))) is None


# --- leading and agreeing ---


def test_everyone_sees_the_same_order_and_it_changes() -> None:
    one = stage(a=report(5), b=report(5), c=report(5), d=report(5))
    other = stage(d=report(5), c=report(5), b=report(5), a=report(5))
    assert one.members(5) == other.members(5)
    # As many as make it impossible by chance that one of three random identities never leads.
    rounds, leaders = 100, set()
    for version in range(rounds):
        some = stage(rounds=rounds, a=report(version), b=report(version), c=report(version))
        leaders.add(some.members(version)[0])
    assert leaders == {A, B, C}


def test_the_majority_has_the_stages_state() -> None:
    wrong = b"w" * 32
    assert stage(a=report(digest=wrong), b=report(), c=report()).agreed_digest(0) == b"d" * 32
    assert stage(a=report(digest=wrong), b=report()).agreed_digest(0) == min(wrong, b"d" * 32)
    assert stage(a=report(1)).agreed_digest(0) is None
    assert stage().agreed_digest(0) is None


def test_a_single_liar_does_not_make_a_version() -> None:
    assert stage().newest() == -1
    assert stage(a=report(3)).newest() == 3
    assert stage(a=report(3), b=report(4)).newest() == 4
    assert stage(a=report(3), b=report(3), c=report(19)).newest() == 3
    assert stage(a=report(3), b=report(4), c=report(4)).newest() == 4
    assert stage(a=report(3), b=report(3), c=report(4), d=report(4)).newest() == 4


def test_a_version_beyond_the_run_is_refused() -> None:
    progress = stage()
    with pytest.raises(ProtocolError) as caught:
        progress.hear(A, report(2**40), 0.0)
    assert caught.value.reason is Reason.TOO_EARLY
    assert progress.newest() == -1


def test_the_number_of_replicas_is_bounded() -> None:
    progress = stage()
    for number in range(MAX_ROSTER + 50):
        progress.hear(PeerId(f"peer {number}"), report(), 0.0)
    assert len(progress.members(0)) == MAX_ROSTER
    progress.hear(PeerId("peer 0"), report(1), 0.0)
    assert len(progress.members(0)) == MAX_ROSTER - 1


def test_an_idle_head_of_the_last_round_makes_up_for_slots_that_were_lost() -> None:
    """Rounds are counted in gradients: with one slot lost for good the last round would never be full."""
    manifest = small_manifest(kind="overlapped")
    last = manifest.schedule.rounds - 1
    heads = StageProgress(manifest)
    heads.hear(A, report(last, slots=range((last - 2) * M, (last + 1) * M)), 0.0)
    assert next_slot(heads, A, last, set()) is None
    assert next_slot(heads, A, last, set(), is_idle=True) == (last + 1) * M
