"""What is held of microbatches is counted and bounded."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.flights import FinishedStore, Flight, Held, Outgoing
from node.trainer import Pass
from protocol.identity import Identity, PeerId
from protocol.receipts import MicrobatchId
from protocol.samples import KEPT_FOR

HEAD = Identity.generate().peer_id


def flight(slot: int, size: int) -> Flight:
    """With `size` bytes in each of its four payloads."""
    held = Held(memoryview(bytes(size)))
    sent = Outgoing((memoryview(bytes(size // 2)), memoryview(bytes(size - size // 2))), b"")
    return Flight(
        MicrobatchId(HEAD, slot), PeerId("x"), 0.0, received=held, gradient=held, output=sent, answer=sent
    )


def test_a_flights_size_is_that_of_all_its_payloads() -> None:
    assert flight(0, 7).size == 28
    assert Flight(MicrobatchId(HEAD, 0), None, 0.0).size == 0


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50), st.floats(0, 40)), max_size=60),
    st.integers(0, 600),
)
@settings(max_examples=80)
def test_the_store_never_holds_more_than_it_may(added: list[tuple[int, int, float]], limit: int) -> None:
    store, now = FinishedStore(limit), 0.0
    for slot, size, passed in added:
        now += passed
        store.add(flight(slot, size), now)
        kept = list(store._flights.values())
        assert store.bytes == sum(one.size for one in kept) <= limit
        assert all(now - one.ended <= KEPT_FOR for one in kept)
        assert [one.ended for one in kept] == sorted(one.ended for one in kept)


def test_the_oldest_goes_first() -> None:
    store = FinishedStore(100)
    for slot in range(5):
        store.add(flight(slot, 10), float(slot))
    assert [store.get(MicrobatchId(HEAD, slot)) is not None for slot in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_after_its_time_nothing_is_kept() -> None:
    store = FinishedStore(1000)
    store.add(flight(0, 10), 0.0)
    store.prune(KEPT_FOR)
    assert len(store) == 1
    store.prune(KEPT_FOR + 0.1)
    assert len(store) == store.bytes == 0


def test_adding_again_replaces_and_removing_twice_is_nothing() -> None:
    store = FinishedStore(1000)
    store.add(flight(0, 10), 0.0)
    store.add(flight(0, 20), 1.0)
    assert (len(store), store.bytes) == (1, 80)
    assert store.remove(MicrobatchId(HEAD, 0)) is not None
    assert store.remove(MicrobatchId(HEAD, 0)) is None
    assert store.bytes == 0


def test_dropping_the_graph_frees_it() -> None:
    one = flight(0, 1)
    x = torch.ones(2, requires_grad=True)
    one.graph = Pass(x, x * 2, [], 0)
    graph = one.graph
    one.release()
    one.release()
    assert one.graph is None and graph._graph is None
