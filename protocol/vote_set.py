"""The votes that a peer holds: a set that only grows by union, and what it amounts to.

Peers that have heard the same votes, in whatever order and however often, hold the same set and see the same verdicts.
The set holds no clock: `now` is Unix time in seconds, given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Final

from protocol import wire
from protocol.codec import digest
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId
from protocol.votes import (
    Cause,
    Contradiction,
    Electorate,
    SignedVote,
    Statement,
    Verdict,
    Vote,
    check_contradiction,
    check_current,
    check_statement,
    contradicts,
)

MAX_SUBJECTS: Final = 1024
"""Peers that one verifier may vote on at a time; its votes on more are refused as busy."""
MAX_HISTORY: Final = 32
"""Unexpired statements of one verifier on one subject that are kept, to hold a later contradiction against."""

VoteKey = tuple[str, str, int]
"""Verifier, subject, sequence: what a vote is held under, and the order in which a set is told."""

OnVerdict = Callable[[PeerId, Verdict, Verdict], None]
"""`(subject, before, after)`, called as soon as the quorum's verdict on a peer has changed."""

_History = dict[int, SignedVote]


class VoteSet:
    """Keyed by verifier, subject and sequence. Of each pair the latest statement counts, the earlier are evidence.

    A verifier that contradicts itself counts no more, for good: the proof takes the place of all its votes.
    """

    def __init__(self, electorate: Electorate) -> None:
        self.electorate = electorate
        self.contradictions: dict[PeerId, Contradiction] = {}
        self._held: dict[PeerId, dict[PeerId, _History]] = {}
        self._verdicts: dict[PeerId, Verdict] = {}
        self._listeners: list[OnVerdict] = []
        self._now = 0.0
        self._digest: bytes | None = None
        self.revision = 0
        """Counts the changes."""

    # --- what it amounts to ---

    def is_banned(self, peer: PeerId) -> bool:
        """As of the last change or `advance`. One look-up: it is asked for every tensor."""
        return self._verdicts.get(peer) is Verdict.BANNED

    def verdict_of(self, peer: PeerId, now: float) -> Verdict:
        """The highest verdict that a quorum of distinct verifiers votes for; a vote counts for lower ones also."""
        votes = [one.vote.verdict for one in self.votes_on(peer, now).values()]
        reached = (
            one for one in Verdict if sum(vote.includes(one) for vote in votes) >= self.electorate.quorum
        )
        return max(reached, key=lambda verdict: verdict.rank, default=Verdict.OK)

    def votes_on(self, peer: PeerId, now: float) -> dict[PeerId, SignedVote]:
        """What each verifier that counts holds the peer to be: its latest statement, if it has not expired."""
        found = {}
        for verifier, subjects in self._held.items():
            latest = _latest(subjects.get(peer, {}))
            if latest is not None and latest.vote.expires > now:
                found[verifier] = latest
        return found

    def bans(self, now: float) -> dict[PeerId, dict[PeerId, SignedVote]]:
        """Every banned peer with the votes that ban it, by verifier."""
        return {
            peer: {
                verifier: signed
                for verifier, signed in self.votes_on(peer, now).items()
                if signed.vote.verdict is Verdict.BANNED
            }
            for peer in sorted(self.subjects())
            if self.verdict_of(peer, now) is Verdict.BANNED
        }

    def subjects(self) -> set[PeerId]:
        """Every peer that a verifier that counts has voted on."""
        return {subject for subjects in self._held.values() for subject in subjects}

    def verdicts(self) -> Mapping[PeerId, Verdict]:
        """The peers whose verdict is not ok, as of the last change or `advance`."""
        return self._verdicts

    def subscribe(self, on_verdict: OnVerdict) -> None:
        self._listeners.append(on_verdict)

    # --- what changes it ---

    def take(self, statement: Statement, now: float) -> bool:
        """`add` or `add_contradiction`, as may be."""
        if isinstance(statement, Contradiction):
            return self.add_contradiction(statement)
        return self.add(statement, now)

    def add(self, signed: SignedVote, now: float) -> bool:
        """Take one vote from anywhere. True if the set changed. Raises `ProtocolError` for one that is not taken.

        The checks, in order: known already (False), the verifier contradicted itself (shut_out), expired, too_early,
        those of `check_statement`, room (busy, stale).
        """
        if self._holds(signed):
            return False
        verifier = PeerId(signed.vote.verifier)
        if verifier in self.contradictions:
            raise ProtocolError(Reason.SHUT_OUT, f"{verifier} contradicted itself")
        check_current(signed.vote, now)
        check_statement(signed, self.electorate)
        self._now = now
        return self._insert(signed)

    def add_contradiction(self, evidence: Contradiction) -> bool:
        """Take the proof that a verifier contradicted itself; one is enough. Raises `ProtocolError`."""
        if evidence.verifier in self.contradictions:
            return False
        check_contradiction(evidence, self.electorate)
        self._exclude(evidence)
        return True

    def cast(
        self,
        identity: Identity,
        subject: PeerId,
        verdict: Verdict,
        cause: Cause,
        now: float,
        *,
        stage: int,
        evidence: bytes,
        samples: int = 0,
        flags: int = 0,
        text: str = "",
    ) -> SignedVote:
        """Our own next statement on `subject`, signed and added. Raises `ProtocolError` if we are no verifier."""
        last = _latest(self._held.get(identity.peer_id, {}).get(subject, {}))
        # By the clock, so that a verifier that lost its files does not give a number a second meaning.
        sequence = max(int(now * 1000), last.vote.sequence + 1 if last else 0)
        issued = max(int(now), last.vote.issued if last else 0)
        vote = Vote(
            run=self.electorate.run,
            verifier=identity.peer_id,
            subject=subject,
            stage=stage,
            verdict=verdict,
            cause=cause,
            text=text,
            evidence=evidence,
            samples=samples,
            flags=flags,
            sequence=sequence,
            issued=issued,
            expires=issued + self.electorate.term,
        )
        signed = SignedVote.sign(vote, identity)
        self.add(signed, now)
        return signed

    def advance(self, now: float) -> None:
        """Let votes expire. Call it regularly: without it a ban is not lifted until something else changes."""
        self._now = now
        changed: set[PeerId] = set()
        for subjects in self._held.values():
            for subject, history in tuple(subjects.items()):
                for sequence in [key for key, one in history.items() if one.vote.expires <= now]:
                    del history[sequence]
                    self._note_change()
                    changed.add(subject)
                if not history:
                    del subjects[subject]
        for subject in changed:
            self._settle(subject)

    # --- as data ---

    def votes(self) -> Iterator[SignedVote]:
        """Every vote held, the superseded ones too, in the order of (verifier, subject, sequence)."""
        for _, subjects in sorted(self._held.items()):
            for _, history in sorted(subjects.items()):
                for _, signed in sorted(history.items()):
                    yield signed

    def page(self, after: VoteKey, limit: int) -> tuple[SignedVote, ...]:
        """The first `limit` votes whose key is greater than `after`."""
        return tuple(islice((signed for signed in self.votes() if key_of(signed.vote) > after), limit))

    def digest(self) -> bytes:
        """Equal for sets that hold the same votes and exclude the same verifiers (by whatever proof)."""
        if self._digest is None:
            votes = digest(*(wire.encode(signed.vote) for signed in self.votes()))
            excluded = (verifier.encode() for verifier in sorted(self.contradictions))
            self._digest = digest(votes, *excluded)
        return self._digest

    # --- inside ---

    def _holds(self, signed: SignedVote) -> bool:
        vote = signed.vote
        history = self._held.get(PeerId(vote.verifier), {}).get(PeerId(vote.subject), {})
        held = history.get(vote.sequence)
        return held is not None and held.vote == vote

    def _insert(self, signed: SignedVote) -> bool:
        verifier, subject = PeerId(signed.vote.verifier), PeerId(signed.vote.subject)
        subjects = self._held.setdefault(verifier, {})
        if subject not in subjects and len(subjects) >= MAX_SUBJECTS:
            raise ProtocolError(Reason.BUSY, f"{verifier} votes on over {MAX_SUBJECTS} peers")
        history = subjects.setdefault(subject, {})
        for held in history.values():
            if contradicts(held.vote, signed.vote):
                self._exclude(Contradiction(*sorted((held, signed), key=wire.encode)))
                return True
        history[signed.vote.sequence] = signed
        self._note_change()
        if len(history) > MAX_HISTORY:
            oldest = min(history)
            del history[oldest]
            if oldest == signed.vote.sequence:
                raise ProtocolError(Reason.STALE, f"{MAX_HISTORY} later votes of {verifier} are held")
        self._settle(subject)
        return True

    def _exclude(self, evidence: Contradiction) -> None:
        self.contradictions[evidence.verifier] = evidence
        self._note_change()
        for subject in self._held.pop(evidence.verifier, {}):
            self._settle(subject)

    def _note_change(self) -> None:
        self._digest = None
        self.revision += 1

    def _settle(self, subject: PeerId) -> None:
        """Work out the verdict anew, and tell of a change."""
        before = self._verdicts.get(subject, Verdict.OK)
        after = self.verdict_of(subject, self._now)
        if after is before:
            return
        if after is Verdict.OK:
            del self._verdicts[subject]
        else:
            self._verdicts[subject] = after
        for tell in self._listeners:
            tell(subject, before, after)


def key_of(vote: Vote) -> VoteKey:
    return vote.verifier, vote.subject, vote.sequence


def _latest(history: _History) -> SignedVote | None:
    return history[max(history)] if history else None
