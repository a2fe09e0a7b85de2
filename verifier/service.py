"""The verifier peer: keeps links to the nodes, listens to what passes, and has the judge sit and the spokesman speak.

It serves no stage, and no node depends on it for its work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time

import structlog

from protocol import wire
from protocol.ballots import Ballots
from protocol.directory import Directory
from protocol.errors import ProtocolError, Reason, UserError
from protocol.host import DEFAULT_LISTEN, Host
from protocol.identity import Identity, PeerId
from protocol.introduction import Deaf, fetch_manifest
from protocol.invite import Invite
from protocol.links import Answer, Link, Switchboard
from protocol.manifest import SignedManifest
from protocol.requests import Nothing
from protocol.samples import ALARM_EVERY, SAMPLE_ALARM, Effort, effort_topic
from protocol.tasks import TaskSet, wait_for
from protocol.vote_set import VoteSet
from verifier.inquirer import Inquirer
from verifier.judge import Judge
from verifier.spokesman import Known, Spokesman
from verifier.streams import StageIndex

log = structlog.get_logger("verifier")

LISTEN_EVERY, LISTEN_CLOSELY = 3.0, 0.5
"""Seconds between two questions to every node, so few that its link seldom needs heartbeats of its own; closely, as
long as somebody is accused."""
MEET_EVERY, MEET_SOON = 60.0, 2.0
"""Seconds between two looks into the directory; soon, as long as there are nodes that we should know and do not."""
SIT_EVERY = 5.0
"""Seconds between two looks for something to judge, though nothing was heard: some of it becomes ready by the clock."""
_EARLY = 0.05
"""Seconds before its time that a turn may come: timers are not exact."""
PATIENCE = 1.5
"""Seconds for which a turn of listening, and a panel, keep the next one waiting: who stalls may take longer, and delays
nobody else's."""
MAX_PANELS = 4
"""Looked at at the same time, where somebody who stalls is in them."""
SPEAK_EVERY = 5.0
"""Seconds between two reviews of our votes, though nothing is new: some go by the clock."""
EFFORT_EVERY = 5.0
REPORT_EVERY = 5.0


@dataclass(frozen=True)
class VerifierConfig:
    invite: Invite
    identity: Path
    listen: Sequence[str] = DEFAULT_LISTEN


@dataclass
class _Node:
    """A node that we know of, since when, how far we have listened and when, and since when it is out of reach."""

    stage: StageIndex
    met: float
    addresses: Sequence[str] = ()
    throughput: float = 0.0
    cursor: int = 0
    heard_at: float = 0.0
    alarm_at: float = -ALARM_EVERY
    lost_at: float | None = None


class Verifier:
    """`start`, then `wait` until something fails. `stop` on every path."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._identity = Identity.load_or_create(config.identity)
        self.peer_id = self._identity.peer_id
        self._tasks: TaskSet | None = None
        self._host: Host | None = None
        self._nodes: dict[PeerId, _Node] = {}
        self._strangers: set[PeerId] = set()
        """Named by nodes as their neighbours, and not known to us; as of the last listening."""
        self._met_at, self._turn, self._lead = -MEET_EVERY, 0, 0.0
        self._called = asyncio.Event()
        """Set by a node's alarm, and by every vote."""
        self._is_alarmed = False
        self._heard = asyncio.Event()
        self._asked: set[PeerId] = set()
        """Nodes that have not answered yet what passed through them."""
        self._finished = 0
        self._panels = asyncio.Semaphore(MAX_PANELS)

    # --- joining ---

    async def start(self) -> None:
        """Join the run. Raises `UserError` for what a person can mend: above all, not to be one of its verifiers."""
        config = self._config
        self._tasks = tasks = TaskSet()
        self._host = host = await Host.start(config.identity, listen=config.listen, seeds=config.invite.seeds)
        tasks.spawn(host.watch())
        signed = await fetch_manifest(host, config.invite)
        electorate = signed.electorate
        if self.peer_id not in electorate.verifiers:
            raise UserError(
                f"This run's manifest does not name {self.peer_id} as a verifier",
                "Give the key that `init` wrote with --identity, or ask the operator to name this peer",
            )
        # By the clock and one after another: what is odd is soon seen by one of us, and what one has seen all look at.
        rank = sorted(electorate.verifiers).index(self.peer_id)
        self._lead = LISTEN_EVERY * rank / len(electorate.verifiers)
        self._stages = signed.manifest.stages.count
        self._expected = self._stages * signed.manifest.schedule.min_replicas
        self._directory = await Directory.join(host, signed.run, self._stages, reader=True)
        await self._open(host, signed)
        tasks.spawn(self._ballots.run())
        self._inquirer = Inquirer(self._switchboard, signed.manifest)
        self.judge = Judge(signed.run, signed.manifest, self._inquirer, self._replicas, self.votes.is_banned)
        self._spokesman = Spokesman(self._identity, electorate, host, self._ballots)
        self._spokesman.remember()
        tasks.spawn(self.judge.watch_ourselves())
        tasks.every(MEET_SOON, self._meet)
        tasks.every(LISTEN_CLOSELY, self._listen)
        tasks.every(0.0, self._sit)
        tasks.every(0.0, self._speak)
        tasks.every(EFFORT_EVERY, self._tell_effort)
        tasks.every(REPORT_EVERY, self._report)
        log.info("verifying", peer=self.peer_id, quorum=electorate.quorum, of=len(electorate.verifiers))

    async def _open(self, host: Host, signed: SignedManifest) -> None:
        """Take links, and learn what has been voted."""
        self.votes = VoteSet(signed.electorate)
        self._switchboard = Switchboard(host, signed.run, stage=-1, owner=Deaf())
        self._switchboard.obey(self.votes)
        key = self._config.identity
        self._ballots = Ballots(
            self._switchboard,
            self.votes,
            seeds=self._config.invite.seeds,
            path=key.with_name(f"{key.stem}-{signed.run.hex()[:16]}.votes"),
        )
        self._ballots.changed = self._called
        self._switchboard.methods[SAMPLE_ALARM] = self._on_alarm
        await self._switchboard.start()
        await self._ballots.start()
        await self._ballots.catch_up()

    # --- who is there, and what passes ---

    @property
    def _links(self) -> dict[PeerId, Link]:
        """Links to nodes."""
        links = self._switchboard.links
        return {peer: link for peer, link in links.items() if link.is_up and link.stage >= 0}

    def _replicas(self, stage: StageIndex) -> list[PeerId]:
        return [peer for peer, link in self._links.items() if link.stage == stage]

    @property
    def _known(self) -> dict[PeerId, Known]:
        now = monotonic()
        return {
            peer: Known(node.stage, node.throughput, now - node.met) for peer, node in self._nodes.items()
        }

    async def _meet(self) -> None:
        """Keep a link to every node, and remember who is out of reach since when."""
        if len(self._nodes) >= self._expected:
            # From now on who comes is named by others, and who leaves or is banned is not missed.
            self._expected = 0
        is_complete = not self._expected and not self._strangers
        if not is_complete or monotonic() - self._met_at >= MEET_EVERY:
            await self._look_up()
        links, now = self._links, monotonic()
        for peer, node in self._nodes.items():
            if peer in links:
                node.lost_at = None
            elif not self.votes.is_banned(peer):
                node.lost_at, node.cursor = node.lost_at or now, 0
                self._switchboard.keep(peer, node.addresses)

    async def _look_up(self) -> None:
        found = await asyncio.gather(*(self._directory.peers(stage) for stage in range(self._stages)))
        records = {peer: record for stage in found for peer, record in stage.items()}
        self._met_at = now = monotonic()
        self._strangers.clear()
        links = self._links
        for peer in [peer for peer in self._nodes if peer not in records and peer not in links]:
            del self._nodes[peer]
        for peer, record in records.items():
            if not self.votes.is_banned(peer):
                node = self._nodes.setdefault(peer, _Node(record.stage, now))
                node.throughput, node.addresses = record.throughput, record.addresses

    async def _listen(self) -> None:
        """By the clock; at once when a node has flagged something; closely while somebody is accused, from the vote on
        that says so."""
        if not self._spokesman.accused():
            await wait_for(self._called, LISTEN_EVERY - (time() + self._lead) % LISTEN_EVERY)
        turn = int((time() + self._lead + _EARLY) // LISTEN_EVERY)
        if turn == self._turn and not self._is_alarmed and not self._spokesman.accused():
            return
        self._turn, self._is_alarmed = turn, False
        await self._listen_to_all()
        before, self._finished = self._finished, self.judge.traffic.finished
        self.judge.earn(self._finished - before)
        self._heard.set()
        now = monotonic()
        for peer, node in self._nodes.items():
            node.stage = self._links[peer].stage if peer in self._links else node.stage
            if node.lost_at is not None:
                self.judge.note_lost(peer, now - node.lost_at)

    async def _on_alarm(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        """A node has flagged something. The checks, in order: form, known to us (wrong_peer), not too often (busy)."""
        wire.decode(Nothing, body)
        node, now = self._nodes.get(link.peer), monotonic()
        if node is None:
            raise ProtocolError(Reason.WRONG_PEER, f"{link.peer} is no node that we know of")
        if now - node.alarm_at < ALARM_EVERY / 2:
            raise ProtocolError(Reason.BUSY, "alarmed already")
        node.alarm_at, self._is_alarmed = now, True
        self._called.set()
        return b"", memoryview(b"")

    async def _listen_to_all(self) -> None:
        """Who still owes an answer is not asked again."""
        assert self._tasks is not None
        free = [(peer, link) for peer, link in self._links.items() if peer not in self._asked]
        await self._tasks.try_for(PATIENCE, *(self._listen_to(peer, link) for peer, link in free))

    async def _listen_to(self, peer: PeerId, link: Link) -> None:
        node = self._nodes.setdefault(peer, _Node(link.stage, monotonic()))
        self._asked.add(peer)
        try:
            listed = await self._inquirer.list_passages(link, node.cursor)
        except ProtocolError as error:
            self.judge.hold_against(peer, "does not say what passed through it", error)
            return
        finally:
            self._asked.discard(peer)
        now = monotonic()
        self.judge.traffic.take(peer, link.stage, listed.passages, node.heard_at, now)
        self._ballots.hear_digest(link, listed.votes)
        node.cursor, node.heard_at = listed.serial, now
        named = {
            PeerId(one) for passage in listed.passages for one in (passage.previous, passage.next) if one
        }
        self._strangers |= {one for one in named - self._nodes.keys() if not self.votes.is_banned(one)}

    # --- judging and speaking ---

    async def _sit(self) -> None:
        """As soon as there is something new to look at."""
        assert self._tasks is not None
        await wait_for(self._heard, SIT_EVERY)
        if not self._panels.locked():
            await self._tasks.try_for(PATIENCE, self._look_at_panel())

    async def _look_at_panel(self) -> None:
        async with self._panels:
            await self.judge.sit(self._spokesman.accused(), self._known)

    async def _speak(self) -> None:
        """Vote as soon as there is something new to say: a panel may take seconds to the end."""
        await wait_for(self.judge.news, SPEAK_EVERY)
        known = self._known
        await self._spokesman.review(await self.judge.opinions(known.keys() | self._spokesman.sworn), known)

    async def _report(self) -> None:
        known = self._known
        await self._spokesman.report(await self.judge.opinions(known), known)

    async def _tell_effort(self) -> None:
        assert self._host is not None
        await self._host.publish(effort_topic(self._switchboard.run), wire.encode(self.effort()))

    def effort(self) -> Effort:
        """What we have done so far."""
        links, counts = self._switchboard.links.values(), self.judge.counts
        streams = [stream for link in links for stream in link.streams]
        return Effort(
            passed=self.judge.traffic.finished,
            sampled=counts["sampled"],
            alarms=counts["alarms"],
            hearings=counts["hearings"],
            bytes=sum(stream.sent_bytes + stream.received_bytes for stream in streams),
        )

    # --- ending ---

    async def wait(self) -> None:
        """For ever, or until a task fails: raises its error."""
        assert self._tasks is not None
        await self._tasks.wait()

    async def stop(self) -> None:
        if self._tasks is not None:
            await self._tasks.stop()
        if hasattr(self, "judge"):
            self.judge.stop()
        if hasattr(self, "_ballots"):
            await self._ballots.stop()
            await self._switchboard.stop()
        if self._host is not None:
            await self._host.stop()
