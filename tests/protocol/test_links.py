"""Links of two switchboards over real p2pd daemons: questions, answers, and what bounds them."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from protocol import links, streams, wire
from protocol.codec import Payload
from protocol.errors import ProtocolError, Reason
from protocol.host import Host
from protocol.identity import Identity, PeerId
from protocol.links import Answer, Link, Switchboard
from protocol.messages import (
    MAX_CHUNK,
    PROTOCOL_VERSION,
    SESSION_SIZE,
    Activation,
    Farewell,
    Gradient,
    Hello,
    Ping,
    Reply,
    Request,
    frame_of,
)
from protocol.requests import Nothing
from protocol.vote_set import VoteSet
from protocol.votes import Cause, Electorate, Verdict
from tests.conftest import StartHost
from tests.protocol.ballots import VERIFIERS, ban

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

EMPTY = memoryview(b"")


class Listener:
    """An owner that remembers."""

    def __init__(self) -> None:
        self.heard: list[wire.Message] = []
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.told: list[str] = []

    def on_link_up(self, link: Link) -> None:
        self.told.append("up")
        self.up.set()

    def on_link_down(self, link: Link) -> None:
        self.told.append("down")
        self.down.set()

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None: ...

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        self.heard.append(message)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(start_host: StartHost) -> list[Host]:
    return [host for host, _ in await asyncio.gather(start_host(), start_host())]


@pytest_asyncio.fixture(loop_scope="module")
async def pair(hosts: list[Host]) -> AsyncIterator[tuple[Switchboard, Switchboard, Link]]:
    """One who answers, one who asks, and the latter's link."""
    run = secrets.token_bytes(32)
    answering, asking = (
        Switchboard(host, run, stage=stage, max_tensor=1024, owner=Listener())
        for stage, host in enumerate(hosts)
    )
    try:
        await answering.start()
        await asking.start(accept=False)
        yield answering, asking, await asking.connect(hosts[0].peer_id, await hosts[0].addresses())
    finally:
        await asking.stop()
        await answering.stop()


Pair = tuple[Switchboard, Switchboard, Link]


async def refused(link: Link, method: str, timeout: float = 10.0) -> Reason:
    with pytest.raises(ProtocolError) as caught:
        await link.request(method, Nothing(), timeout=timeout)
    return caught.value.reason


async def test_a_question_is_answered_with_its_payload(pair: Pair) -> None:
    answering, _, link = pair

    async def echo(link: Link, body: bytes, payload: memoryview) -> Answer:
        return body, payload

    answering.methods["echo"] = echo
    payload = memoryview(secrets.token_bytes(MAX_CHUNK))
    body, answer = await link.request("echo", Nothing(), payload, timeout=20.0)
    assert (body, answer) == (wire.encode(Nothing()), payload)


async def test_refusals_are_codes_and_failures_tell_nothing(pair: Pair) -> None:
    answering, _, link = pair

    async def broken(link: Link, body: bytes, payload: memoryview) -> Answer:
        raise RuntimeError("a secret")

    async def too_much(link: Link, body: bytes, payload: memoryview) -> Answer:
        return b"", memoryview(bytes(MAX_CHUNK + 1))

    async def stale(link: Link, body: bytes, payload: memoryview) -> Answer:
        raise ProtocolError(Reason.STALE, "a detail")

    answering.methods |= {"broken": broken, "too much": too_much, "stale": stale}
    with capture_logs():
        assert await refused(link, "broken") is Reason.INTERNAL
        assert await refused(link, "too much") is Reason.OVERSIZED
        assert await refused(link, "stale") is Reason.STALE
        assert await refused(link, "nothing such") is Reason.UNKNOWN_METHOD
    assert set(answering.refusals.counts) == {
        Reason.INTERNAL, Reason.OVERSIZED, Reason.STALE, Reason.UNKNOWN_METHOD,
    }  # fmt: skip
    assert link.is_up


async def test_questions_answered_at_a_time_are_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    answering, asking, link = pair
    release = asyncio.Event()

    async def wait(link: Link, body: bytes, payload: memoryview) -> Answer:
        await release.wait()
        return b"", EMPTY

    answering.methods["wait"] = wait
    asked = [asyncio.create_task(link.request("wait", Nothing(), timeout=20.0)) for _ in range(40)]
    done: set[asyncio.Task[Answer]] = set()
    async with asyncio.timeout(20.0):
        while len(done) < 40 - links.MAX_REQUESTS:
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION, timeout=0.01)
    assert answering.links[asking.host.peer_id].answering == links.MAX_REQUESTS
    release.set()
    results = await asyncio.gather(*asked, return_exceptions=True)
    reasons = [one.reason for one in results if isinstance(one, ProtocolError)]
    assert reasons == [Reason.BUSY] * (40 - links.MAX_REQUESTS)
    assert answering.refusals.counts[Reason.BUSY] == len(reasons)


async def test_payloads_of_questions_are_bounded_over_all_peers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, _, link = pair
    monkeypatch.setattr(links, "MAX_ANSWERING", 1000)
    release = asyncio.Event()

    async def wait(link: Link, body: bytes, payload: memoryview) -> Answer:
        await release.wait()
        return b"", EMPTY

    answering.methods["wait"] = wait
    first = asyncio.create_task(link.request("wait", Nothing(), memoryview(bytes(900)), timeout=20.0))
    await asyncio.sleep(0)  # It is sent first.
    with pytest.raises(ProtocolError) as caught:
        await link.request("wait", Nothing(), memoryview(bytes(200)), timeout=20.0)
    assert caught.value.reason is Reason.BUSY
    release.set()
    await first
    assert answering._answering == 0
    await link.request("wait", Nothing(), memoryview(bytes(200)), timeout=20.0)


async def test_an_answer_that_does_not_come_is_a_time_out_and_a_late_one_is_counted(pair: Pair) -> None:
    answering, asking, link = pair
    release = asyncio.Event()

    async def wait(link: Link, body: bytes, payload: memoryview) -> Answer:
        await release.wait()
        return b"", EMPTY

    async def now(link: Link, body: bytes, payload: memoryview) -> Answer:
        return b"", EMPTY

    answering.methods |= {"wait": wait, "now": now}
    assert await refused(link, "wait", timeout=0.1) is Reason.TIMED_OUT
    assert not link._questions
    release.set()
    await link.request("now", Nothing(), timeout=10.0)
    assert asking.refusals.counts == {Reason.UNSOLICITED: 1}


async def test_who_waits_for_an_answer_learns_that_the_peer_is_gone(pair: Pair) -> None:
    answering, _, link = pair

    async def leave(link: Link, body: bytes, payload: memoryview) -> Answer:
        link.close(abort=True)
        await asyncio.Event().wait()
        return b"", EMPTY

    answering.methods["leave"] = leave
    assert await refused(link, "leave") is Reason.UNREACHABLE
    assert not link.is_up
    with pytest.raises(ProtocolError):
        link.send(Reply(1, None, b""))


async def within(event: asyncio.Event) -> None:
    async with asyncio.timeout(20.0):
        await event.wait()


async def test_a_link_ends_on_both_sides_with_any_of_its_streams(pair: Pair) -> None:
    """What was under way on that stream is lost, and nothing else would tell."""
    answering, asking, link = pair
    await asking._open_stream(link.peer)
    (other,) = answering.links.values()
    await until(lambda: sum(stream.greeted for one in (link, other) for stream in one.streams) == 4)
    link.streams[1].abort()
    await asyncio.gather(within(asking._owner.down), within(answering._owner.down))
    assert not link.is_up
    assert not asking.links
    assert not answering.links
    assert (await asking.connect(link.peer)).is_up


async def test_a_side_that_begins_anew_makes_the_other_begin_anew(pair: Pair) -> None:
    """One side has given up its link unnoticed, as after a long silence: its next stream must not join the old link."""
    answering, asking, link = pair
    owner: Listener = answering._owner
    await within(owner.up)
    (old,) = answering.links.values()
    del asking.links[link.peer]
    owner.up.clear()
    with suppress(ProtocolError):  # The other side may have greeted before it saw that this is another link.
        await asking.connect(link.peer)
    await within(owner.down)
    assert not old.is_up
    async with asyncio.timeout(20.0):
        while not owner.up.is_set():
            with suppress(ProtocolError):
                await asking.connect(link.peer)
            await asyncio.sleep(0.01)
    assert owner.told == ["up", "down", "up"]


async def test_no_more_links_than_there_is_room_for(
    pair: Pair, hosts: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, asking, link = pair
    monkeypatch.setattr(links, "MAX_LINKS", 0)
    with pytest.raises(ProtocolError) as caught:
        await answering.connect(hosts[0].peer_id, ["/ip4/127.0.0.1/tcp/1"])
    assert caught.value.reason is Reason.BUSY
    assert await asking.connect(hosts[0].peer_id) is link  # Those that are there stay.


async def test_a_silent_stream_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, asking, _ = pair
    owner = asking._owner
    assert isinstance(owner, Listener)
    monkeypatch.setattr(links, "HEARTBEAT", 0.05)
    monkeypatch.setattr(links, "DEAD_AFTER", 0.5)
    monkeypatch.setattr(streams.Stream, "buffer_updated", lambda self, size: None)
    asking._tasks.spawn(asking._watch())
    with capture_logs():
        await asyncio.wait_for(owner.down.wait(), 20.0)
    assert asking.refusals.counts[Reason.TIMED_OUT] >= 1


# --- bans ---


async def test_a_banned_peers_link_ends_at_once_and_it_is_told_why(pair: Pair, hosts: list[Host]) -> None:
    answering, asking, link = pair
    votes = banning(answering, hosts[1].peer_id)
    assert await refused(link, "nothing") is Reason.UNKNOWN_METHOD, "one vote is no quorum"
    ban(votes, hosts[1].peer_id, VERIFIERS[1:2], time.time())
    assert hosts[1].peer_id not in answering.links, "at once"
    await until(lambda: link.farewell is Reason.BANNED)
    with pytest.raises(ProtocolError):
        link.send(Request(1, "nothing", b""))
    assert asking.refusals.counts[Reason.BANNED] == 1


async def test_a_banned_peer_is_neither_accepted_nor_dialled_until_it_is_voted_down(
    pair: Pair, hosts: list[Host]
) -> None:
    answering, asking, _ = pair
    await until(lambda: hosts[1].peer_id in answering.links)
    votes = banning(answering, hosts[1].peer_id)
    ban(votes, hosts[1].peer_id, VERIFIERS[1:2], time.time())
    await until(lambda: not asking.links)
    for side, other in ((asking, hosts[0]), (answering, hosts[1])):
        with pytest.raises(ProtocolError) as caught:
            await side.connect(other.peer_id, await other.addresses())
        assert caught.value.reason is Reason.BANNED
    assert answering.refusals.counts[Reason.BANNED] == 1, (
        "the accepted stream; our own dialling is no refusal"
    )
    assert not answering.links
    for verifier in VERIFIERS[:2]:
        votes.cast(
            verifier, hosts[1].peer_id, Verdict.OK, Cause.CLEARED, time.time(), stage=1, evidence=b"e" * 32
        )
    link = await asking.connect(hosts[0].peer_id, await hosts[0].addresses())
    assert await refused(link, "nothing") is Reason.UNKNOWN_METHOD


async def test_whom_a_peer_knows_as_banned_when_it_starts_to_obey(pair: Pair, hosts: list[Host]) -> None:
    answering, _, link = pair
    await until(lambda: hosts[1].peer_id in answering.links)
    answering.obey(votes_against(hosts[1].peer_id, answering.run))
    assert not answering.links
    await until(lambda: link.farewell is Reason.BANNED)


class _OpenStream:
    greeted, is_open, backlog = False, True, 0

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)


async def test_who_has_not_greeted_us_yet_is_told_that_it_is_banned_all_the_same() -> None:
    link, stream = Link("peer"), _OpenStream()
    link.streams.append(stream)  # type: ignore[arg-type]
    link.say_farewell(Reason.BANNED)
    assert stream.sent == [Farewell(Reason.BANNED)]


def electorate_of(run: bytes) -> Electorate:
    return Electorate(run, frozenset(one.peer_id for one in VERIFIERS), quorum=2, term=3600)


def votes_against(peer: PeerId, run: bytes) -> VoteSet:
    votes = VoteSet(electorate_of(run))
    ban(votes, peer, VERIFIERS[:2], time.time())
    return votes


def banning(switchboard: Switchboard, peer: PeerId) -> VoteSet:
    """A vote set that the switchboard obeys, with one vote of the two that it takes to ban `peer`."""
    votes = VoteSet(electorate_of(switchboard.run))
    switchboard.obey(votes)
    ban(votes, peer, VERIFIERS[:1], time.time())
    return votes


async def until(is_done: Callable[[], bool]) -> None:
    async with asyncio.timeout(15.0):
        while not is_done():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_stream_that_comes_while_its_link_closes_is_no_offence(pair: Pair) -> None:
    """Its hello is not heard, and what follows must not count as sent by one who has not greeted."""
    answering, _, _ = pair
    stranger = Identity.generate().peer_id
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    adopting = asyncio.create_task(answering._adopt(stranger, ours))
    await asyncio.sleep(0)
    answering.links[stranger].close()
    await asyncio.get_running_loop().sock_sendall(theirs, frame_of(Ping(1)))
    with pytest.raises(ProtocolError) as caught:
        await adopting
    assert caught.value.reason is Reason.UNREACHABLE
    loop = asyncio.get_running_loop()
    with suppress(ConnectionResetError):
        async with asyncio.timeout(10):
            while await loop.sock_recv(theirs, 4096):
                pass
    theirs.close()
    assert stranger not in answering._penalties and not answering.refusals.counts[Reason.MALFORMED]


async def test_a_farewell_is_read_by_one_whose_hello_comes_after_it(pair: Pair) -> None:
    """It greets and pings before it can know that it is banned: neither must reset the stream under the farewell."""
    answering, _, _ = pair
    stranger = Identity.generate().peer_id
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    await answering._adopt(stranger, ours)
    answering.obey(votes_against(stranger, answering.run))
    loop = asyncio.get_running_loop()
    hello = Hello(PROTOCOL_VERSION, answering.run, 1, secrets.token_bytes(SESSION_SIZE))
    await loop.sock_sendall(theirs, frame_of(hello) + frame_of(Ping(1)))
    heard = b""
    with theirs:
        async with asyncio.timeout(10):
            while more := await loop.sock_recv(theirs, 4096):
                heard += more
    assert frame_of(Farewell(Reason.BANNED)) in heard


async def test_a_link_is_kept_with_one_attempt_at_a_time(pair: Pair, hosts: list[Host]) -> None:
    _, asking, link = pair
    peer, addresses = hosts[0].peer_id, await hosts[0].addresses()
    asking.keep(peer, addresses)
    assert not asking._dialling, "there is a link already"
    asking._close(link)
    for _ in range(3):
        asking.keep(peer, addresses)
    async with asyncio.timeout(10):
        renewed = await asking.connect(peer, addresses)
        await renewed.settled.wait()
    assert renewed.is_up and renewed is not link
    assert len(renewed.streams) == 1
    asking.keep(PeerId(Identity.generate().peer_id), ())  # Nobody's: that it fails is not raised anywhere.
