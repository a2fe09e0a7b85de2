"""What one verifier thinks of every peer: the judging core on the works of panels, hearings, and conduct. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from protocol import wire
from protocol.codec import digest
from protocol.identity import PeerId
from protocol.receipts import MicrobatchId
from protocol.reputation import MAX_WORDS
from protocol.votes import MAX_TEXT, Cause, Verdict
from verifier.conduct import Conduct
from verifier.detector import Hearing
from verifier.exhibits import Work
from verifier.sentinel import Screening, Sentinel, Settings
from verifier.streams import Direction, Hops, Stream, quorum_of
from verifier.tribunal import PRICE, Finding

_NOTHING = b"\0" * 32


@dataclass(frozen=True)
class Opinion:
    """What this verifier holds of a peer, and on what grounds. `evidence` is a digest of the receipts behind it."""

    verdict: Verdict
    cause: Cause
    text: str
    evidence: bytes
    samples: int
    log_evidence: float
    flags: Mapping[Direction, int]
    words: tuple[str, ...]
    """The latest that was noted of it."""


@dataclass
class Bench:
    """`screen`, `record` and `opinion` are called on one thread. Who hosts this pays for hearings, so that
    `settings.recompute` is not used."""

    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self._sentinel = Sentinel(self.settings)
        self.conduct = Conduct()
        self._convicted: dict[PeerId, tuple[Cause, str, bytes]] = {}
        self._stray_states: dict[PeerId, bytes | None] = {}
        """The last weights of each peer that were found not to be its stage's: that need not be found again."""
        self._notes: dict[PeerId, deque[str]] = {}
        self._flags: dict[PeerId, Counter[Direction]] = {}

    def screen(self, works: Sequence[Work], round: int, replicas: int) -> Screening:
        """Measure the works of one stream; `replicas` serve the stage."""
        return self._sentinel.screen(hops_of(works, round), quorum_of(replicas))

    def worth_hearing(
        self,
        screening: Screening,
        works: Sequence[Work],
        accused: Collection[PeerId],
        flagged: Collection[MicrobatchId] = (),
    ) -> list[int]:
        """Places of works that others should do again, the oddest first: of each accused the oddest work and those on
        `flagged` microbatches, and the oddest of all others that look odd. Where many do, it is rather the baseline
        that is off."""
        chosen = [
            place
            for place, work in enumerate(works)
            if (screening.wanted[place] or work.peer in accused)
            and work.peer not in self._convicted
            and not self._is_known_stray(work)
        ]
        oddest: dict[tuple[PeerId, MicrobatchId | None] | None, int] = {}
        for place in sorted(chosen, key=lambda place: -float(screening.raw[place].max())):
            peer, microbatch = works[place].peer, works[place].receipt.microbatch
            key = (peer, microbatch if microbatch in flagged else None) if peer in accused else None
            oddest.setdefault(key, place)
        return list(oddest.values())

    def record(
        self, screening: Screening, works: Sequence[Work], findings: Mapping[int, Finding], now: float
    ) -> None:
        """Learn from a stream's works and from what was found of them, by place."""
        for work in works:
            if work.is_relabelled:
                self._convict(
                    work,
                    Cause.RECEIPTS,
                    "by its own receipts it put other labels in the place of those it was sent",
                )
        hearings = {}
        for place, finding in findings.items():
            work, guilty = works[place], finding.guilty
            is_stray = work.state is not None and work.state != finding.state
            if guilty and is_stray and not finding.is_relabelled:
                self._stray_states[work.peer] = work.state
                guilty = None
            elif guilty:
                self._convict(work, Cause.RECOMPUTED, _outcome(finding, guilty))
            elif guilty is False:
                self.conduct.return_to_fold(work.peer)
            self._note(work, _outcome(finding, guilty))
            hearings[place] = Hearing(guilty, finding.asked * PRICE[work.direction])
            for liar in finding.liars:
                self.conduct.fail(
                    liar, "says of others' work what other replicas contradict", Cause.RECOMPUTED
                )
        for peer in {work.peer for work in works if self._is_known_stray(work)}:
            self.conduct.stray(peer, now)
        judgement = self._sentinel.record(screening, hearings)
        for row in np.flatnonzero(judgement.refused):
            work = works[int(row)]
            if row not in findings:
                self._note(work, "odd by its statistics; nobody was asked to do it again")
            self._flags.setdefault(work.peer, Counter())[work.direction] += 1
        for ban in judgement.bans:
            if PeerId(ban.peer) not in self._convicted:
                evidence = digest(*(work.evidence for work in works if work.peer == ban.peer))
                self._convicted[PeerId(ban.peer)] = Cause.EVIDENCE, ban.reason, evidence

    def _is_known_stray(self, work: Work) -> bool:
        return work.state is not None and self._stray_states.get(work.peer) == work.state

    def _convict(self, work: Work, cause: Cause, what: str) -> None:
        text = f"{work.direction} of stage {work.stage} at weights {work.receipt.version}: {what}"
        self._convicted.setdefault(work.peer, (cause, text, work.evidence))

    def _note(self, work: Work, what: str) -> None:
        notes = self._notes.setdefault(work.peer, deque(maxlen=MAX_WORDS))
        notes.append(f"{work.direction} at weights {work.receipt.version}: {what}"[:MAX_TEXT])

    def opinion(self, peer: PeerId, now: float) -> Opinion:
        standing = self._sentinel.standing(peer)
        flags = self._flags.get(peer, Counter())
        cause, text, evidence = Cause.CLEARED, "nothing is held against it", _NOTHING
        verdict = standing.verdict
        if peer in self._convicted:
            cause, text, evidence = self._convicted[peer]
            verdict = Verdict.BANNED
        elif verdict is not Verdict.OK:
            cause, text = Cause.EVIDENCE, f"evidence of {standing.log_evidence:.1f} nats against it"
        conduct = self.conduct.verdict(peer, now)
        if conduct.rank > verdict.rank:
            verdict = conduct
            cause, text = self.conduct.reason(peer, now)
            evidence = digest(text.encode())
        return Opinion(
            verdict,
            cause,
            text[:MAX_TEXT],
            evidence,
            standing.samples,
            standing.log_evidence,
            dict(flags),
            tuple(self._notes.get(peer, ())),
        )


def _outcome(finding: Finding, guilty: bool | None) -> str:
    if guilty and finding.is_relabelled:
        return f"{finding.asked} replicas that drew the same samples have other labels for them"
    if guilty:
        return f"{finding.asked} replicas that did it again got something else ({finding.difference:.0%} off)"
    if finding.guilty:
        return "made with other weights than its stage had"
    if guilty is False:
        return "another replica that did it again got the same"
    return "too few replicas could do it again"


def hops_of(works: Sequence[Work], round: int) -> Hops:
    """The works of one stream as the core sees them: each one sequence of a microbatch, (N, 1, T, W)."""
    first = works[0]
    sources = [work.source.tensor for work in works if work.source is not None]
    keys = (digest(wire.encode(work.receipt.microbatch)) for work in works)
    return Hops(
        first.stage,
        first.direction,
        round,
        tuple(work.peer for work in works),
        tuple(int.from_bytes(key[:6], "little") for key in keys),
        torch.stack(sources) if len(sources) == len(works) else None,
        torch.stack([work.output.tensor for work in works]),
        np.ones(len(works), dtype=np.bool_),
    )


def streams_of(works: Sequence[Work]) -> list[tuple[Stream, list[Work]]]:
    """The works by stream, in the order in which tensors travel: forward from the head, then back from the tail."""
    streams: dict[Stream, list[Work]] = {}
    for work in works:
        streams.setdefault((work.stage, work.direction), []).append(work)

    def way(stream: Stream) -> tuple[bool, int]:
        stage, direction = stream
        return direction is Direction.GRADIENT, stage if direction is Direction.ACTIVATION else -stage

    return [(stream, streams[stream]) for stream in sorted(streams, key=way)]
