"""How votes reach everyone over real p2pd daemons: by gossip, on joining, by comparing, from disk."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import permutations
from pathlib import Path

import pytest
import pytest_asyncio

from protocol import ballots, wire
from protocol.ballots import Ballots
from protocol.errors import ProtocolError, Reason
from protocol.host import Host
from protocol.identity import Identity, PeerId
from protocol.introduction import Deaf
from protocol.links import Answer, Link, Switchboard
from protocol.requests import VOTES, VotesHeld
from protocol.vote_set import VoteSet
from protocol.votes import MAX_BUNDLE, Cause, Electorate, SignedVote, Verdict, VoteBundle, votes_topic
from tests.conftest import StartHost
from tests.protocol.ballots import PEERS, STRANGER, VERIFIERS, ban, make_vote

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]

VICTIM = PEERS[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(start_host: StartHost) -> list[Host]:
    return [host for host, _ in await asyncio.gather(start_host(), start_host(), start_host())]


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballots, "COMPARE_EVERY", 0.3)
    monkeypatch.setattr(ballots, "COMPARE_AGAIN", 0.3)
    monkeypatch.setattr(ballots, "_TICK", 0.05)


class Peers:
    """A run of its own on the given hosts."""

    def __init__(self, hosts: list[Host]) -> None:
        self.hosts, self.run = hosts, secrets.token_bytes(32)
        self.electorate = Electorate(self.run, frozenset(one.peer_id for one in VERIFIERS), 2, 3600)
        self._boards: list[Switchboard] = []
        self._running: list[tuple[Ballots, asyncio.Task[None]]] = []

    async def board(self, number: int, stage: int = 0) -> Switchboard:
        board = Switchboard(self.hosts[number], self.run, stage=stage, owner=Deaf())
        self._boards.append(board)
        await board.start()
        return board

    async def start(
        self,
        number: int,
        *,
        seeds: tuple[str, ...] = (),
        path: Path | None = None,
        runs: bool = True,
        stage: int = 0,
    ) -> Ballots:
        board = await self.board(number, stage)
        found = Ballots(board, VoteSet(self.electorate), seeds=seeds, path=path)
        board.obey(found.votes)
        await found.start()
        self._running.append((found, asyncio.create_task(found.run() if runs else asyncio.sleep(0))))
        return found

    async def target(self, number: int) -> tuple[PeerId, list[str]]:
        return self.hosts[number].peer_id, await self.hosts[number].addresses()

    async def stop(self) -> None:
        for found, task in self._running:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await found.stop()
        for board in self._boards:
            await board.stop()


@asynccontextmanager
async def run_on(hosts: list[Host]) -> AsyncIterator[Peers]:
    """Each of them connected to the others, which a ban in an earlier test may have ended."""
    for one, other in permutations(hosts, 2):
        await one.connect(other.peer_id, await other.addresses())
    peers = Peers(hosts)
    try:
        yield peers
    finally:
        await peers.stop()


async def until(is_done: Callable[[], bool], within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while not is_done():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def board_of(one: Ballots) -> Switchboard:
    return one._switchboard


async def test_votes_reach_everyone_by_gossip(hosts: list[Host]) -> None:
    async with run_on(hosts) as peers:
        one, *others = [await peers.start(number, runs=False) for number in range(3)]
        await asyncio.sleep(1.5)  # Until gossipsub has made its mesh.
        changes: list[tuple[PeerId, Verdict, Verdict]] = []
        others[0].votes.subscribe(lambda *change: changes.append(change))
        await one.publish(*ban(one.votes, VICTIM, VERIFIERS[:1], time.time()))
        await until(lambda: all(list(other.votes.votes()) for other in others))
        assert not any(other.votes.is_banned(VICTIM) for other in others)
        await one.publish(*ban(one.votes, VICTIM, VERIFIERS[1:2], time.time()))
        await until(lambda: all(other.votes.is_banned(VICTIM) for other in others))
        assert changes == [(VICTIM, Verdict.OK, Verdict.BANNED)]
        assert all(other.changed.is_set() for other in others)


@pytest.mark.parametrize("reason", [Reason.TIMED_OUT, Reason.UNREACHABLE])
async def test_a_vote_that_p2pd_does_not_take_is_kept_for_comparing(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    async def refuse(topic: str, data: bytes) -> None:
        raise ProtocolError(reason, topic)

    async with run_on(hosts) as peers:
        one = await peers.start(0, runs=False)
        monkeypatch.setattr(hosts[0], "publish", refuse)
        await one.publish(*ban(one.votes, VICTIM, VERIFIERS[:1], time.time()))
        assert list(one.votes.votes())


async def test_gossip_that_does_not_hold_is_counted_and_dropped(hosts: list[Host]) -> None:
    async with run_on(hosts) as peers:
        hearing = await peers.start(0, runs=False)
        await asyncio.sleep(1.5)
        now = int(time.time())
        content = {"run": peers.run, "issued": now, "expires": now + 60}
        forged = SignedVote.sign(make_vote(**content), STRANGER)
        foreign = SignedVote.sign(make_vote(**{**content, "run": b"x" * 32}), VERIFIERS[0])
        stale = SignedVote.sign(make_vote(**{**content, "issued": 1, "expires": 2}), VERIFIERS[0])
        good = SignedVote.sign(make_vote(**content), VERIFIERS[0])
        messages = [
            b"\x91" * 1000,
            b"\x00" * (ballots.MAX_NEWS + 1),
            wire.encode(VoteBundle((forged, foreign, stale, good))),
        ]
        for data in messages:
            await hosts[1].publish(votes_topic(peers.run), data)
        await until(lambda: bool(list(hearing.votes.votes())))
        counts = board_of(hearing).refusals.counts
        await until(lambda: counts[Reason.OVERSIZED] == 1 and counts[Reason.MALFORMED] == 1)
        assert list(hearing.votes.votes()) == [good]
        assert [counts[reason] for reason in (Reason.BAD_SIGNATURE, Reason.FOREIGN_RUN, Reason.EXPIRED)] == [
            1,
            1,
            1,
        ]


async def test_a_joiner_has_all_votes_before_anything_else(hosts: list[Host]) -> None:
    async with run_on(hosts) as peers:
        seed = await peers.start(0, stage=-1)
        now = time.time()
        subjects = [Identity.generate().peer_id for _ in range(MAX_BUNDLE // 2 + 5)]
        for subject in subjects:
            ban(seed.votes, subject, VERIFIERS[:2], now)
        peer, addresses = await peers.target(0)
        joiner = await peers.start(1, seeds=(addresses[0],), runs=False)
        assert await joiner.catch_up([(STRANGER.peer_id, []), await peers.target(2)]) == 1, (
            "the seed alone answers"
        )
        assert all(map(joiner.votes.is_banned, subjects))
        assert joiner.votes.digest() == seed.votes.digest()
        await until(lambda: peer not in board_of(joiner).links), "seeds have room for so many links"


async def test_a_joiner_refuses_whom_it_learnt_to_be_banned(hosts: list[Host]) -> None:
    async with run_on(hosts) as peers:
        knowing = await peers.start(0)
        ban(knowing.votes, hosts[2].peer_id, VERIFIERS[:2], time.time())
        joiner = await peers.start(1, runs=False)
        assert await joiner.catch_up([await peers.target(0)]) == 1
        with pytest.raises(ProtocolError) as caught:
            await board_of(joiner).connect(*await peers.target(2))
        assert caught.value.reason is Reason.BANNED


async def test_comparing_brings_both_sides_what_they_lack(hosts: list[Host]) -> None:
    async with run_on(hosts) as peers:
        one, other = (
            await peers.start(0),
            await peers.start(1, runs=False),
        )  # The latter never asks by itself.
        now = time.time()
        ban(one.votes, VICTIM, VERIFIERS[:1], now)
        ban(other.votes, VICTIM, VERIFIERS[1:2], now)  # Neither is gossiped.
        await board_of(one).connect(*await peers.target(1))
        await until(lambda: one.votes.is_banned(VICTIM) and other.votes.is_banned(VICTIM))
        assert one.votes.digest() == other.votes.digest()


async def test_who_contradicts_itself_to_two_peers_is_found_out_by_both(hosts: list[Host]) -> None:
    async with run_on(hosts) as peers:
        one, other = await peers.start(0), await peers.start(1)
        third = await peers.start(2, runs=False)
        await asyncio.sleep(1.5)
        now = int(time.time())
        content = {"run": peers.run, "issued": now, "expires": now + 60}
        for told, verdict in ((one, Verdict.BANNED), (other, Verdict.OK)):
            told.votes.add(SignedVote.sign(make_vote(verdict=verdict, **content), VERIFIERS[0]), now)
        await board_of(one).connect(*await peers.target(1))
        everyone = (one, other, third)
        await until(lambda: all(VERIFIERS[0].peer_id in each.votes.contradictions for each in everyone))
        ban(third.votes, VICTIM, VERIFIERS[1:2], now)
        assert not third.votes.is_banned(VICTIM)


async def test_a_peer_that_was_away_knows_its_bans_and_learns_the_new_ones(
    hosts: list[Host], tmp_path: Path
) -> None:
    path = tmp_path / "node.votes"
    async with run_on(hosts) as peers:
        staying = await peers.start(0)
        away = await peers.start(1, path=path)
        ban(away.votes, PEERS[1], VERIFIERS[:2], time.time())
        await until(path.exists)
        await board_of(away).stop()
        board = await peers.board(2)
        again = Ballots(board, VoteSet(peers.electorate), path=path)
        board.obey(again.votes)
        await again.start()
        assert again.votes.is_banned(PEERS[1]), "before anybody is asked"
        ban(staying.votes, VICTIM, VERIFIERS[:2], time.time())
        assert await again.catch_up([await peers.target(0)]) == 1
        assert again.votes.is_banned(VICTIM)


Page = Callable[[Peers], Awaitable[tuple[bytes, bytes]]]
HELD = wire.encode(VotesHeld(b"d" * 32))


def page(*votes: SignedVote) -> tuple[bytes, bytes]:
    return HELD, wire.encode(VoteBundle(votes))


@pytest.mark.parametrize("kind", ["forged", "foreign", "out of order", "no bundle", "no head"])
async def test_who_serves_what_no_honest_peer_does_is_shut_out(hosts: list[Host], kind: str) -> None:
    async with run_on(hosts) as peers:
        now = int(time.time())
        content = {"run": peers.run, "issued": now, "expires": now + 60}
        good = [SignedVote.sign(make_vote(sequence=number, **content), VERIFIERS[0]) for number in (1, 2)]
        served, reason = {
            "forged": (page(SignedVote.sign(make_vote(**content), STRANGER)), Reason.BAD_SIGNATURE),
            "foreign": (page(SignedVote.sign(make_vote(), VERIFIERS[0])), None),
            "out of order": (page(*reversed(good)), Reason.MALFORMED),
            "no bundle": ((HELD, b"\xc1"), Reason.MALFORMED),
            "no head": ((b"\xc1", b""), Reason.MALFORMED),
        }[kind]
        lying = await peers.board(0)

        async def answer(link: Link, body: bytes, payload: memoryview) -> Answer:
            return served[0], memoryview(served[1])

        lying.methods[VOTES] = answer
        asking = await peers.start(1, runs=False)
        assert await asking.catch_up([await peers.target(0)]) == (1 if reason is None else 0)
        assert not list(asking.votes.votes())
        if reason is not None:
            assert board_of(asking).refusals.counts[reason] == 1
            with pytest.raises(ProtocolError) as caught:
                await board_of(asking).connect(*await peers.target(0))
            assert caught.value.reason is Reason.SHUT_OUT


async def test_a_lie_without_end_ends(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are full, of votes that are no use, with keys that rise: as many as a set can have, and no more."""
    for name, limit in (("MAX_BUNDLE", 1), ("MAX_SUBJECTS", 2), ("MAX_HISTORY", 2)):
        monkeypatch.setattr(ballots, name, limit)
    async with run_on(hosts) as peers:
        lying, asked = await peers.board(0), 0

        async def answer(link: Link, body: bytes, payload: memoryview) -> Answer:
            nonlocal asked
            asked += 1
            expired = make_vote(run=peers.run, sequence=asked, issued=1, expires=2)
            head, bundle = page(SignedVote(expired, b"s" * 64))
            return head, memoryview(bundle)

        lying.methods[VOTES] = answer
        asking = await peers.start(1, runs=False)
        assert await asking.catch_up([await peers.target(0)]) == 1
        assert asked == len(VERIFIERS) * 2 * 2 + 1
        assert not list(asking.votes.votes())


async def test_a_vote_is_cast_once_and_told_again(hosts: list[Host]) -> None:
    """A verifier that starts again takes its own past from others, and goes on from there."""
    async with run_on(hosts) as peers:
        keeping = await peers.start(0)
        ban(keeping.votes, VICTIM, VERIFIERS[:1], time.time())
        verifier = await peers.start(1, runs=False)
        await verifier.catch_up([await peers.target(0)])
        verifier.votes.cast(
            VERIFIERS[0], VICTIM, Verdict.OK, Cause.CLEARED, time.time(), stage=1, evidence=b"e" * 32
        )
        assert len(list(verifier.votes.votes())) == 2
        assert not verifier.votes.contradictions
