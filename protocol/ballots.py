"""How votes get to every peer: heard by gossip, asked for on joining, compared again and again, kept on disk.

Gossip is fast and may miss somebody; so peers also compare their sets and take what they lack (anti-entropy): each with
another at random, now and then, and verifiers with every node whenever they listen to it. All of it leads to the same
set, since sets are merged by union.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from time import monotonic, time
from typing import Final
from weakref import WeakKeyDictionary

import structlog

from protocol import vote_file, wire
from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.links import DIAL_TIMEOUT, Answer, Link, Switchboard
from protocol.requests import VOTES, VotesHeld, VotesWanted
from protocol.tasks import Background
from protocol.vote_set import MAX_HISTORY, MAX_SUBJECTS, VoteKey, VoteSet, key_of
from protocol.votes import MAX_BUNDLE, Contradiction, SignedVote, Statement, VoteBundle, votes_topic

log = structlog.get_logger("votes")

COMPARE_EVERY: Final = 15.0
"""Seconds between two comparisons with a random peer."""
COMPARE_AGAIN: Final = 5.0
"""Seconds at least between two comparisons over the same link."""
MAX_NEWS: Final = 64 * 1024
"""Bytes of statements in one gossip message."""
_TICK = 1.0
_ANSWER_WITHIN = 10.0
_DIAL_WITHIN = 3.0
_SEED_EVERY = 2
_LINGER = 3.0
_START: Final[VoteKey] = ("", "", 0)

_NO_HONEST_PEER_SENDS = (Reason.MALFORMED, Reason.FOREIGN_RUN, Reason.WRONG_PEER, Reason.BAD_SIGNATURE)


class Ballots:
    """The votes of one run at one peer. `start`, then `run` until cancelled; `save` at the end.

    `seeds`: addresses, each ending in /p2p/<id>; `path`: where the set is kept, if it is to be kept. `changed` is set
    whenever the set has changed. Enforcement is not done here: see `Switchboard.obey`.
    """

    def __init__(
        self,
        switchboard: Switchboard,
        votes: VoteSet,
        *,
        seeds: Sequence[str] = (),
        path: Path | None = None,
        clock: Callable[[], float] = time,
    ) -> None:
        self.votes = votes
        self.changed = asyncio.Event()
        self._switchboard, self._path, self._clock = switchboard, path, clock
        self._seed_ids: dict[PeerId, list[str]] = {}
        for seed in seeds:
            self._seed_ids.setdefault(PeerId(seed.rpartition("/p2p/")[2]), []).append(seed)
        self._saved = 0
        self._compared: WeakKeyDictionary[Link, float] = WeakKeyDictionary()
        self._tasks = Background()
        switchboard.methods[VOTES] = self._answer

    async def start(self) -> None:
        """Read what is on disk, and listen from now on."""
        if self._path is not None:
            # Here, not on a thread: who obeys the set is told of every ban in it, on the loop.
            vote_file.load(self.votes, self._path, self._clock())
            self._saved = self.votes.revision
        host = self._switchboard.host
        await host.subscribe(votes_topic(self._switchboard.run), self._hear)

    async def run(self) -> None:
        """Until cancelled: let votes expire, save them, compare the set with others'."""
        turn, due = 0, monotonic() + random.uniform(0.0, COMPARE_EVERY)
        while True:
            self.votes.advance(self._clock())
            await self.save()
            if monotonic() >= due:
                turn, due = turn + 1, monotonic() + COMPARE_EVERY
                self._tasks.spawn(self._compare(turn))
            await asyncio.sleep(_TICK)

    async def save(self) -> None:
        """Write the set if it has changed. A disk that is full does not stop anything."""
        if self._path is None or self._saved == self.votes.revision:
            return
        revision, content = self.votes.revision, vote_file.archive(self.votes)
        try:
            await asyncio.to_thread(vote_file.write, content, self._path)
        except OSError as error:
            log.warning("votes are not saved", file=str(self._path), problem=error.strerror)
        self._saved = revision

    # --- telling ---

    async def publish(self, *statements: Statement) -> None:
        """Tell everyone at once. What gossip does not bring to them, comparing will."""
        bundle = VoteBundle(
            tuple(one for one in statements if isinstance(one, SignedVote)),
            tuple(one for one in statements if isinstance(one, Contradiction)),
        )
        self._merge(bundle, self._switchboard.host.peer_id)
        try:
            await self._switchboard.host.publish(votes_topic(self._switchboard.run), wire.encode(bundle))
        except ProtocolError as error:
            log.warning("a vote was not gossiped", problem=str(error))

    async def _answer(self, link: Link, body: bytes, payload: memoryview) -> Answer:
        """Checks, in order: malformed. Anyone may ask, whom we ban too, where there is a link to ask over."""
        wanted = wire.decode(VotesWanted, body)
        after = (wanted.verifier, wanted.subject, wanted.sequence)
        held = wire.encode(VotesHeld(self.votes.digest()))
        if after == _START:
            if wanted.known == self.votes.digest():
                return held, memoryview(b"")
            # It may know what we do not. Its question is our occasion.
            self._tasks.spawn(self._ask_back(link))
        proofs = tuple(self.votes.contradictions.values()) if after == _START else ()
        return held, memoryview(wire.encode(VoteBundle(self.votes.page(after, MAX_BUNDLE), proofs)))

    # --- hearing ---

    def _hear(self, author: PeerId, data: bytes) -> None:
        """Gossip. The checks, in order, each IGNORE: size, form, those of `VoteSet.add` for each statement."""
        try:
            if len(data) > MAX_NEWS:
                raise ProtocolError(Reason.OVERSIZED, "votes")
            bundle = wire.decode(VoteBundle, data)
        except ProtocolError as error:
            self._switchboard.refusals.count(author, error)
            return
        for refused in self._merge(bundle, author):
            self._switchboard.refusals.count(author, refused)

    def _merge(self, bundle: VoteBundle, source: PeerId) -> list[ProtocolError]:
        """Take every statement that holds; the errors of those that do not."""
        before, excluded = self.votes.revision, set(self.votes.contradictions)
        errors: list[ProtocolError] = []
        statements: tuple[Statement, ...] = (*bundle.contradictions, *bundle.votes)
        for statement in statements:
            try:
                self.votes.take(statement, self._clock())
            except ProtocolError as error:
                errors.append(error)
        if self.votes.revision != before:
            self.changed.set()
        told = {evidence.verifier for evidence in bundle.contradictions}
        for verifier in set(self.votes.contradictions) - excluded:
            log.warning(
                "a verifier contradicts itself: its votes count no more", verifier=verifier, source=source
            )
            if verifier not in told:
                # We found it by having heard both sides; others may have heard one.
                self._tasks.spawn(self.publish(self.votes.contradictions[verifier]))
        return errors

    def hear_digest(self, link: Link, theirs: bytes) -> None:
        """Of a peer's set, from itself. Where ours is another we ask for the votes, and it asks back."""
        if theirs != self.votes.digest():
            self._tasks.spawn(self._ask_back(link))

    # --- asking ---

    async def catch_up(self, peers: Iterable[tuple[PeerId, Sequence[str]]] = ()) -> int:
        """Ask the seeds and these peers, all at once, for all their votes; how many of them answered.

        To be awaited before anything is routed. Of several: one alone could keep a ban from us.
        """
        targets = {peer: list(addresses) for peer, addresses in self._seed_ids.items()}
        targets |= {peer: list(addresses) for peer, addresses in peers}
        targets.pop(self._switchboard.host.peer_id, None)
        answered = await asyncio.gather(*(self._visit(peer, known) for peer, known in targets.items()))
        return sum(answered)

    async def _visit(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        is_brief = peer in self._seed_ids and peer not in self._switchboard.links
        try:
            # Nobody but a seed is worth a long wait: there are others.
            patience = DIAL_TIMEOUT if peer in self._seed_ids else _DIAL_WITHIN
            link = await self._switchboard.connect(peer, addresses, timeout=patience)
            if is_brief:
                # Seeds have room for so many links; ours stays for as long as they may ask back.
                asyncio.get_running_loop().call_later(_LINGER, link.close)
            await self._ask(link)
        except ProtocolError as error:
            log.debug("no votes from this peer", peer=peer, reason=error.reason.value)
            return False
        return True

    async def _compare(self, turn: int) -> None:
        """With a random neighbour, now and then with a seed, where those meet that have no neighbour in common."""
        links = [link for link in self._switchboard.links.values() if link.is_up]
        if self._seed_ids and (not links or turn % _SEED_EVERY == 0):
            seed = random.choice(tuple(self._seed_ids))
            await self._visit(seed, self._seed_ids[seed])
        elif links:
            await self._ask_back(random.choice(links))

    async def _ask_back(self, link: Link) -> None:
        now = monotonic()
        if now - self._compared.get(link, -COMPARE_AGAIN) < COMPARE_AGAIN:
            return
        self._compared[link] = now
        try:
            await self._ask(link)
        except ProtocolError as error:
            log.debug("no votes from this peer", peer=link.peer, reason=error.reason.value)

    async def _ask(self, link: Link) -> None:
        """Fetch what this peer holds, page by page. Raises `ProtocolError`; what came before that is kept.

        A page is checked: form (malformed), its keys rise beyond what was asked for (malformed), then each statement.
        What no honest peer sends shuts the peer out.
        """
        after, known = _START, self.votes.digest()
        most = len(self.votes.electorate.verifiers) * MAX_SUBJECTS * MAX_HISTORY // MAX_BUNDLE + 1
        for _ in range(most):
            wanted = VotesWanted(known, *after)
            body, payload = await link.request(VOTES, wanted, timeout=_ANSWER_WITHIN)
            try:
                wire.decode(VotesHeld, body)
                if not payload:
                    return
                bundle = wire.decode(VoteBundle, payload)
                after = self._take_page(link.peer, bundle, after)
            except ProtocolError as error:
                self._switchboard.reject(link.peer, error)
                raise
            if len(bundle.votes) < MAX_BUNDLE:
                return

    def _take_page(self, peer: PeerId, bundle: VoteBundle, after: VoteKey) -> VoteKey:
        """The key of the page's last vote. Raises `ProtocolError` for what no honest peer sends."""
        keys = [after, *(key_of(signed.vote) for signed in bundle.votes)]
        if any(later <= earlier for earlier, later in pairwise(keys)):
            raise ProtocolError(Reason.MALFORMED, "votes out of order")
        for error in self._merge(bundle, peer):
            if error.reason in _NO_HONEST_PEER_SENDS:
                raise error
            self._switchboard.refusals.count(peer, error)
        return keys[-1]

    # --- ending ---

    async def stop(self) -> None:
        await self._tasks.stop()
        await self.save()
