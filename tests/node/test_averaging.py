"""Averaging: exact, robust where it must be, and all or nothing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import pytest_asyncio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node import averaging
from node.averaging import PART_FLOATS, Averaging, parts_of, reduce_parts, shares
from protocol import wire
from protocol.errors import ProtocolError, Reason
from protocol.host import Host
from protocol.introduction import Deaf
from protocol.links import Answer, Link, Switchboard
from protocol.messages import MAX_CHUNK
from protocol.requests import ROUND_PART, Member, RoundPart
from tests.conftest import StartHost

# --- pure ---


@st.composite
def sums(draw: st.DrawFn) -> tuple[list[Tensor], list[int]]:
    """Each member's gradient sum, of whole numbers so that every order of summation is exact, and its count."""
    members, size = draw(st.integers(1, 2)), draw(st.integers(1, 20))
    counts = draw(st.lists(st.integers(1, 8), min_size=members, max_size=members))
    parts = draw(
        st.lists(
            st.lists(st.integers(-1000, 1000), min_size=size, max_size=size),
            min_size=members,
            max_size=members,
        )
    )
    return [torch.tensor(part, dtype=torch.float32) for part in parts], counts


@given(sums())
@settings(max_examples=60)
def test_the_mean_is_over_all_microbatches(given_: tuple[list[Tensor], list[int]]) -> None:
    parts, counts = given_
    assert torch.equal(reduce_parts(parts, counts), torch.stack(parts).sum(0) / sum(counts))


@given(st.integers(3, 8), st.integers(0, 2**31))
@settings(max_examples=40)
def test_honest_members_are_averaged_exactly(members: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 6, (members,), generator=generator).tolist()
    parts = [torch.randn(100, generator=generator) * count for count in counts]
    total = torch.zeros(100)
    for part in parts:
        total += part
    assert torch.equal(reduce_parts(parts, counts), total / sum(counts))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_part_that_is_not_finite_is_left_out(bad: float) -> None:
    poisoned = torch.tensor([1.0, bad])
    assert torch.equal(reduce_parts([torch.tensor([2.0, 4.0]), poisoned], [2, 3]), torch.tensor([1.0, 2.0]))
    assert torch.equal(reduce_parts([poisoned], [1]), torch.zeros(2))


def test_a_member_without_microbatches_has_no_say() -> None:
    assert torch.equal(reduce_parts([torch.tensor([6.0]), torch.tensor([9e9])], [3, 0]), torch.tensor([2.0]))


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e18, 1e30])
def test_an_outlier_is_bounded(scale: float) -> None:
    honest = [torch.ones(4), torch.ones(4) * 2, torch.ones(4)]
    mean = reduce_parts([*honest, torch.full((4,), -scale)], [1, 2, 1, 1])
    assert torch.isfinite(mean).all()
    assert mean.norm() <= 10 * 2 / 5 * 2 + 1e-3


def test_a_part_that_only_one_member_touched_is_no_outlier() -> None:
    """As rows of an embedding: the others' gradients are zero there."""
    zero, some = torch.zeros(4), torch.tensor([3.0, 0.0, 0.0, 4.0])
    assert torch.equal(reduce_parts([zero, some, zero, zero], [1, 1, 1, 1]), some / 4)


@given(st.integers(0, 3 * PART_FLOATS), st.integers(1, 9))
@settings(max_examples=60)
def test_shares_and_parts_cover_everything_once(size: int, members: int) -> None:
    cut = shares(size, members)
    assert len(cut) == members
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    pieces = [part for share in cut for part in parts_of(share)]
    assert sum(map(len, pieces)) == size
    assert all(later.start == earlier.stop for earlier, later in pairwise(pieces))
    assert all(0 < 4 * len(part) <= MAX_CHUNK for part in pieces)


# --- over p2pd ---

pytestmark = pytest.mark.timeout(60)
peers3 = pytest.mark.asyncio(loop_scope="module")
SIZE = 3_000


@dataclass
class Peer:
    switchboard: Switchboard
    gradient: Tensor
    averaging: Averaging | None = None

    async def answer(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        if self.averaging is None:
            raise ProtocolError(Reason.UNSOLICITED)
        return await self.averaging.take_part(link, wire.decode(RoundPart, body), payload)

    def begin(self, roster: list[Member]) -> Averaging:
        self.averaging = Averaging(self.switchboard, 0, 1, roster, self.gradient)
        return self.averaging


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(start_host: StartHost) -> list[Host]:
    return [host for host, _ in await asyncio.gather(*(start_host() for _ in range(3)))]


@pytest_asyncio.fixture(loop_scope="module")
async def peers(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Peer]]:
    """Three replicas of one stage, linked to each other, in the order of the roster."""
    monkeypatch.setattr(averaging, "PART_FLOATS", 400)
    run = secrets.token_bytes(32)
    hosts = sorted(hosts, key=lambda host: host.peer_id)
    generator = torch.Generator().manual_seed(1)
    made = [
        Peer(
            Switchboard(host, run, stage=1, owner=Deaf()),
            torch.randn(SIZE, generator=generator),
        )
        for host in hosts
    ]
    try:
        for peer in made:
            peer.switchboard.methods[ROUND_PART] = peer.answer
            await peer.switchboard.start()
        for peer in made:
            for host in hosts:
                if host is not peer.switchboard.host:
                    await peer.switchboard.connect(host.peer_id, await host.addresses())
        yield made
    finally:
        for peer in made:
            if peer.averaging is not None:
                peer.averaging.abandon()
            await peer.switchboard.stop()


def roster_of(peers: list[Peer], counts: list[int]) -> list[Member]:
    return [Member(peer.switchboard.host.peer_id, count) for peer, count in zip(peers, counts, strict=True)]


@peers3
async def test_all_members_get_the_same_bits(peers: list[Peer]) -> None:
    counts = [3, 1, 2]
    begun = [peer.begin(roster_of(peers, counts)) for peer in peers]
    results = await asyncio.gather(*(one.run() for one in begun))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    expected = torch.cat(
        [
            reduce_parts([peer.gradient[part.start : part.stop] for peer in peers], counts)
            for share in shares(SIZE, 3)
            for part in parts_of(share)
        ]
    )
    assert torch.equal(results[0], expected)


@peers3
async def test_with_a_member_gone_it_fails_for_all(
    peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "AVERAGING_TIMEOUT", 2.0)
    roster = roster_of(peers, [1, 1, 1])
    begun = [peer.begin(roster) for peer in peers[:2]]
    await peers[2].switchboard.stop()
    results = await asyncio.gather(*(one.run() for one in begun), return_exceptions=True)
    assert all(isinstance(one, ProtocolError) for one in results), results


@peers3
async def test_with_a_member_that_never_answers_it_fails_for_all(
    peers: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "AVERAGING_TIMEOUT", 1.0)

    async def hang(link: Link, body: bytes, payload: memoryview) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    peers[1].switchboard.methods[ROUND_PART] = hang
    roster = roster_of(peers, [1, 1, 1])
    begun = [peers[0].begin(roster), peers[2].begin(roster)]
    results = await asyncio.gather(*(one.run() for one in begun), return_exceptions=True)
    assert {getattr(one, "reason", one) for one in results} == {Reason.TIMED_OUT}


@peers3
@pytest.mark.parametrize(
    "payload, reason", [(b"\xff" * 1600, Reason.NOT_FINITE), (b"", Reason.MALFORMED)], ids=["nan", "empty"]
)
async def test_a_mean_that_is_not_finite_or_of_another_size_fails(
    peers: list[Peer], payload: bytes, reason: Reason
) -> None:
    async def lie(link: Link, body: bytes, asked: memoryview) -> Answer:
        return b"", memoryview(bytearray(payload[: len(asked)]))

    roster = roster_of(peers, [1, 1, 1])
    peers[1].switchboard.methods[ROUND_PART] = lie
    peers[2].begin(roster)
    with pytest.raises(ProtocolError) as caught:
        await peers[0].begin(roster).run()
    assert caught.value.reason is reason


@peers3
async def test_parts_of_others_again_or_of_another_shape_are_refused(peers: list[Peer]) -> None:
    one, two, three = peers
    running = asyncio.create_task(one.begin(roster_of([one, two], [1, 1])).run())
    own = next(parts_of(shares(SIZE, 2)[0]))
    payload = memoryview(bytes(4 * len(own)))
    part = RoundPart(0, 1, own.start, own.stop)

    async def ask(peer: Peer, question: RoundPart, sent: memoryview) -> None:
        link = await peer.switchboard.connect(one.switchboard.host.peer_id)
        await link.request(ROUND_PART, question, sent, timeout=0.5)

    cases = [
        (three, part, payload, Reason.WRONG_PEER),
        (two, part, payload[:-4], Reason.WRONG_SHAPE),
        (two, RoundPart(0, 1, own.start + 1, own.stop), payload[:-4], Reason.WRONG_SHAPE),
        (two, RoundPart(0, 1, 2**50, 2**51), payload, Reason.WRONG_SHAPE),
        (two, RoundPart(0, 1, SIZE - 10, SIZE), payload[:40], Reason.WRONG_SHAPE),
    ]
    for peer, question, sent, reason in cases:
        with pytest.raises(ProtocolError) as caught:
            await ask(peer, question, sent)
        assert caught.value.reason is reason
    await ask(two, part, payload)
    with pytest.raises(ProtocolError) as caught:
        await ask(two, part, payload)
    assert caught.value.reason is Reason.REPLAYED
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@peers3
async def test_who_waits_for_an_abandoned_round_is_told(peers: list[Peer]) -> None:
    one, two, _ = peers
    roster = roster_of(peers, [1, 1, 1])
    begun = one.begin(roster)
    own = next(parts_of(shares(SIZE, 3)[0]))
    link = await two.switchboard.connect(one.switchboard.host.peer_id)
    question = RoundPart(0, 1, own.start, own.stop)
    asked = asyncio.create_task(
        link.request(ROUND_PART, question, memoryview(bytes(4 * len(own))), timeout=10.0)
    )
    arrived = begun._parts[own.start].received
    async with asyncio.timeout(10.0):
        while not arrived:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    begun.abandon()
    with pytest.raises(ProtocolError) as caught:
        await asked
    assert caught.value.reason is Reason.ABANDONED
