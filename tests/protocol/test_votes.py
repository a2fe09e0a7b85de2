"""Votes and sets of them: what is believed, what a minority can do (nothing), and what a liar gives away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import directory, manifest, receipts, reputation, vote_file, vote_set, votes, wire
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity
from protocol.vote_set import MAX_HISTORY, VoteSet, key_of
from protocol.votes import (
    CLOCK_SLACK,
    MAX_VOTE,
    Cause,
    Contradiction,
    SignedVote,
    Verdict,
    Vote,
    check_contradiction,
    check_statement,
    contradicts,
    read_vote,
)
from tests.protocol.ballots import (
    ELECTORATE,
    NOW,
    PEERS,
    STRANGER,
    TERM,
    VERIFIERS,
    ban,
    make_vote,
    signed_vote,
)
from tests.protocol.strategies import messages_of, mutated

VICTIM = PEERS[0]
FIRST, SECOND, THIRD = VERIFIERS


def set_of(*statements: SignedVote | Contradiction) -> VoteSet:
    found = VoteSet(ELECTORATE)
    for statement in statements:
        found.take(statement, NOW)
    return found


def refusal(action: Callable[[], Any]) -> Reason | None:
    try:
        action()
    except ProtocolError as error:
        return error.reason
    return None


# --- one vote ---


def test_a_vote_of_a_verifier_is_believed() -> None:
    signed = signed_vote()
    assert read_vote(wire.encode(signed)) == signed
    check_statement(signed, ELECTORATE)
    assert set_of(signed).votes_on(VICTIM, NOW) == {FIRST.peer_id: signed}


def test_the_longest_vote_fits() -> None:
    big = 2**53
    vote = make_vote(
        text="🦀" * votes.MAX_TEXT, samples=big, flags=big, sequence=big, issued=big, expires=big, stage=4095,
        verdict=Verdict.QUARANTINED, cause=Cause.RECOMPUTED,
    )  # fmt: skip
    assert read_vote(wire.encode(SignedVote.sign(vote, FIRST))).vote == vote


@pytest.mark.parametrize(
    ("changes", "signer", "reason"),
    [
        ({"run": b"x" * 32}, FIRST, Reason.FOREIGN_RUN),
        ({"verifier": STRANGER.peer_id}, STRANGER, Reason.WRONG_PEER),
        ({"verifier": PEERS[1]}, FIRST, Reason.WRONG_PEER),
        ({"subject": SECOND.peer_id}, FIRST, Reason.WRONG_PEER),
        ({"subject": FIRST.peer_id}, FIRST, Reason.WRONG_PEER),
        ({"text": "\x1b[2J all is well"}, FIRST, Reason.MALFORMED),
        ({"text": "a\nb"}, FIRST, Reason.MALFORMED),
        ({"expires": NOW + TERM + 1}, FIRST, Reason.MALFORMED),
        ({"issued": NOW + 5, "expires": NOW + 5}, FIRST, Reason.MALFORMED),
        ({"verifier": SECOND.peer_id}, FIRST, Reason.BAD_SIGNATURE),
        ({}, STRANGER, Reason.BAD_SIGNATURE),
        ({"issued": NOW - TERM, "expires": NOW}, FIRST, Reason.EXPIRED),
        ({"issued": NOW + CLOCK_SLACK + 1, "expires": NOW + TERM}, FIRST, Reason.TOO_EARLY),
    ],
)
def test_a_vote_that_is_not_taken(changes: dict[str, Any], signer: Identity, reason: Reason) -> None:
    signed = SignedVote.sign(make_vote(**changes), signer)
    held = set_of()
    assert refusal(lambda: held.add(signed, NOW)) is reason
    assert held.digest() == set_of().digest()


def test_an_oversized_vote_is_refused_unread() -> None:
    assert refusal(lambda: read_vote(b"\x91" * (MAX_VOTE + 1))) is Reason.OVERSIZED


CHANGES: dict[str, Any] = {
    "stage": 2, "verdict": Verdict.SUSPECT, "cause": Cause.RECEIPTS, "text": "another", "evidence": b"x" * 32,
    "samples": 41, "flags": 8, "sequence": 2, "issued": NOW + 1, "expires": NOW + 2, "subject": PEERS[1],
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_any_field_changed_after_signing_is_noticed(field: str) -> None:
    signed = signed_vote()
    altered = SignedVote(msgspec.structs.replace(signed.vote, **{field: CHANGES[field]}), signed.signature)
    assert refusal(lambda: set_of(altered)) is Reason.BAD_SIGNATURE


def test_every_field_is_covered_by_a_check_or_by_the_signature() -> None:
    assert CHANGES.keys() | {"run", "verifier"} == set(Vote.__struct_fields__)


def test_a_vote_is_signed_for_nothing_else() -> None:
    domains = [votes.DOMAIN, receipts.DOMAIN, directory.DOMAIN, manifest.DOMAIN, reputation.DOMAIN]
    assert len(set(domains)) == len(domains)
    vote = make_vote()
    for domain in set(domains) - {votes.DOMAIN}:
        forged = SignedVote(vote, FIRST.sign(domain, wire.encode(vote)))
        assert refusal(lambda forged=forged: set_of(forged)) is Reason.BAD_SIGNATURE


@given(messages_of(SignedVote))
@settings(max_examples=60)
def test_no_vote_passes_by_chance(signed: SignedVote) -> None:
    assert refusal(lambda: set_of(signed)) is not None


@given(st.data())
@settings(max_examples=80)
def test_a_damaged_vote_is_refused_or_the_same(data: st.DataObject) -> None:
    signed = signed_vote()
    try:
        back = read_vote(data.draw(mutated(wire.encode(signed))))
    except ProtocolError:
        return
    assert back == signed or refusal(lambda: set_of(back)) is not None


# --- the quorum ---


def test_a_minority_does_nothing_and_its_disagreement_shows() -> None:
    held = VoteSet(ELECTORATE)
    heard: list[Any] = []
    held.subscribe(lambda *change: heard.append(change))
    (vote,) = ban(held, VICTIM, [FIRST], NOW)
    held.cast(SECOND, VICTIM, Verdict.OK, Cause.CLEARED, NOW, stage=1, evidence=b"e" * 32)
    assert held.verdict_of(VICTIM, NOW) is Verdict.OK
    assert not held.is_banned(VICTIM) and not held.bans(NOW) and not heard
    assert {peer: one.vote.verdict for peer, one in held.votes_on(VICTIM, NOW).items()} == {
        FIRST.peer_id: Verdict.BANNED,
        SECOND.peer_id: Verdict.OK,
    }
    assert held.votes_on(VICTIM, NOW)[FIRST.peer_id] == vote


def test_a_vote_counts_once_however_often_and_in_whatever_form_it_comes() -> None:
    held = VoteSet(ELECTORATE)
    (vote,) = ban(held, VICTIM, [FIRST], NOW)
    assert not held.add(vote, NOW)
    again = ban(held, VICTIM, [FIRST] * 5, NOW)
    assert len({one.vote.sequence for one in (vote, *again)}) == 6
    assert not held.is_banned(VICTIM), "six statements of one verifier"
    ban(held, VICTIM, [SECOND], NOW)
    assert held.is_banned(VICTIM)


@pytest.mark.parametrize(
    ("cast", "verdict"),
    [
        ((Verdict.BANNED, Verdict.BANNED, Verdict.OK), Verdict.BANNED),
        ((Verdict.BANNED, Verdict.QUARANTINED, Verdict.OK), Verdict.QUARANTINED),
        ((Verdict.BANNED, Verdict.OK, Verdict.SUSPECT), Verdict.SUSPECT),
        ((Verdict.BANNED, Verdict.OK, Verdict.OK), Verdict.OK),
        ((Verdict.QUARANTINED,) * 3, Verdict.QUARANTINED),
        ((Verdict.BANNED, Verdict.SUSPECT, Verdict.QUARANTINED), Verdict.QUARANTINED),
        ((), Verdict.OK),
    ],
)
def test_a_vote_counts_for_the_lower_verdicts_too(cast: tuple[Verdict, ...], verdict: Verdict) -> None:
    held = VoteSet(ELECTORATE)
    for verifier, one in zip(VERIFIERS, cast, strict=False):
        held.cast(verifier, VICTIM, one, Cause.EVIDENCE, NOW, stage=1, evidence=b"e" * 32)
    assert held.verdict_of(VICTIM, NOW) is verdict
    assert held.verdicts().get(VICTIM, Verdict.OK) is verdict
    assert held.verdict_of(PEERS[1], NOW) is Verdict.OK


def test_a_ban_can_be_voted_down_and_every_change_is_told() -> None:
    held = VoteSet(ELECTORATE)
    heard: list[Any] = []
    held.subscribe(lambda *change: heard.append(change))
    ban(held, VICTIM, [FIRST, SECOND], NOW)
    assert set(held.bans(NOW)) == {VICTIM}
    assert set(held.bans(NOW)[VICTIM]) == {FIRST.peer_id, SECOND.peer_id}
    held.cast(FIRST, VICTIM, Verdict.OK, Cause.CLEARED, NOW + 1, stage=1, evidence=b"e" * 32)
    assert not held.is_banned(VICTIM)
    assert heard == [(VICTIM, Verdict.OK, Verdict.BANNED), (VICTIM, Verdict.BANNED, Verdict.OK)]


def test_a_replayed_earlier_vote_changes_nothing() -> None:
    held = VoteSet(ELECTORATE)
    old = ban(held, VICTIM, [FIRST, SECOND], NOW)
    held.cast(FIRST, VICTIM, Verdict.OK, Cause.CLEARED, NOW + 1, stage=1, evidence=b"e" * 32)
    for vote in old:
        held.add(vote, NOW + 2)
    assert not held.is_banned(VICTIM)
    newer_alone = VoteSet(ELECTORATE)
    for vote in (*held.votes_on(VICTIM, NOW).values(), *old):
        newer_alone.add(vote, NOW + 2)
    assert not newer_alone.is_banned(VICTIM)


def test_votes_expire_and_do_not_come_back() -> None:
    held = VoteSet(ELECTORATE)
    cast = ban(held, VICTIM, [FIRST, SECOND], NOW)
    heard: list[Any] = []
    held.subscribe(lambda *change: heard.append(change))
    held.advance(NOW + TERM - 1)
    assert held.is_banned(VICTIM)
    assert held.verdict_of(VICTIM, NOW + TERM) is Verdict.OK
    held.advance(NOW + TERM)
    assert not held.is_banned(VICTIM)
    assert heard == [(VICTIM, Verdict.BANNED, Verdict.OK)]
    assert not list(held.votes()) and not held.subjects()
    assert refusal(lambda: held.add(cast[0], NOW + TERM)) is Reason.EXPIRED


def test_who_lost_its_files_does_not_contradict_itself() -> None:
    held, fresh = VoteSet(ELECTORATE), VoteSet(ELECTORATE)
    ban(held, VICTIM, [FIRST], NOW)
    vote = fresh.cast(FIRST, VICTIM, Verdict.OK, Cause.CLEARED, NOW + 1, stage=1, evidence=b"e" * 32)
    held.add(vote, NOW + 1)
    assert not held.contradictions


def test_a_clock_that_goes_back_does_not_make_a_verifier_contradict_itself() -> None:
    held = VoteSet(ELECTORATE)
    ban(held, VICTIM, [FIRST], NOW + 50)
    ban(held, VICTIM, [FIRST], NOW + 20)
    assert not held.contradictions
    assert len(list(held.votes())) == 2


def test_who_is_no_verifier_cannot_cast() -> None:
    held = VoteSet(ELECTORATE)
    assert refusal(lambda: ban(held, VICTIM, [STRANGER], NOW)) is Reason.WRONG_PEER


# --- contradictions ---

LIES = {
    "one number, two verdicts": {"verdict": Verdict.OK},
    "one number, two stages": {"stage": 2},
    "one number, two terms": {"expires": NOW + 9},
    "later, issued sooner": {"sequence": 2, "issued": NOW - 1, "expires": NOW + TERM - 1},
    "later, expires sooner": {"sequence": 2, "expires": NOW + TERM - 1},
}


@pytest.mark.parametrize("changes", LIES.values(), ids=LIES.keys())
@pytest.mark.parametrize("turned", [False, True])
def test_who_contradicts_itself_counts_no_more(changes: dict[str, Any], turned: bool) -> None:
    pair = [signed_vote(), signed_vote(**changes)]
    held = VoteSet(ELECTORATE)
    ban(held, VICTIM, [SECOND], NOW)
    ban(held, PEERS[1], [FIRST, SECOND], NOW)
    for one in reversed(pair) if turned else pair:
        held.add(one, NOW)
    evidence = held.contradictions[FIRST.peer_id]
    assert {wire.encode(evidence.first), wire.encode(evidence.second)} == set(map(wire.encode, pair))
    check_contradiction(evidence, ELECTORATE)
    assert not held.is_banned(PEERS[1]), "its vote counts on nobody"
    assert refusal(lambda: held.add(signed_vote(sequence=99), NOW)) is Reason.SHUT_OUT
    # Whoever is shown the evidence alone comes to the same.
    other = VoteSet(ELECTORATE)
    ban(other, PEERS[1], [FIRST, SECOND], NOW)
    assert other.add_contradiction(wire.decode(Contradiction, wire.encode(evidence)))
    assert not other.is_banned(PEERS[1])
    held.advance(NOW + 10 * TERM)
    assert held.contradictions, "this does not expire"


def test_a_later_statement_does_not_hide_a_contradiction() -> None:
    held = set_of(signed_vote(), signed_vote(sequence=2), signed_vote(sequence=3))
    held.add(signed_vote(verdict=Verdict.OK), NOW)
    assert FIRST.peer_id in held.contradictions


def test_nobody_is_framed_with_statements_that_agree_or_are_of_others() -> None:
    one = signed_vote()
    for other in (
        one,
        signed_vote(sequence=2),
        signed_vote(FIRST, PEERS[1]),
        signed_vote(SECOND, verdict=Verdict.OK),
        SignedVote.sign(make_vote(run=b"x" * 32, verdict=Verdict.OK), FIRST),
    ):
        assert not contradicts(one.vote, other.vote)
        assert refusal(lambda other=other: set_of(Contradiction(one, other))) is Reason.MALFORMED
    forged = SignedVote.sign(make_vote(verdict=Verdict.OK), STRANGER)
    assert refusal(lambda: set_of(Contradiction(one, forged))) is Reason.BAD_SIGNATURE
    stranger = [SignedVote.sign(make_vote(STRANGER, sequence=1, stage=s), STRANGER) for s in (1, 2)]
    assert refusal(lambda: set_of(Contradiction(*stranger))) is Reason.WRONG_PEER


# --- bounds ---


def test_the_votes_of_one_verifier_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_set, "MAX_SUBJECTS", 2)
    held = VoteSet(ELECTORATE)
    ban(held, PEERS[0], [FIRST], NOW)
    ban(held, PEERS[1], [FIRST], NOW)
    assert refusal(lambda: ban(held, PEERS[2], [FIRST], NOW)) is Reason.BUSY
    ban(held, PEERS[2], [SECOND], NOW)
    ban(held, PEERS[0], [FIRST] * (2 * MAX_HISTORY), NOW)
    assert len(list(held.votes())) == MAX_HISTORY + 2
    assert refusal(lambda: held.add(signed_vote(sequence=1), NOW)) is Reason.STALE
    held.advance(NOW + TERM)
    ban(held, PEERS[2], [FIRST], NOW + TERM)


def test_pages_make_the_whole_and_end() -> None:
    held = VoteSet(ELECTORATE)
    for peer in PEERS:
        ban(held, peer, [FIRST, FIRST, SECOND], NOW)
    found: list[SignedVote] = []
    after: vote_set.VoteKey = ("", "", 0)
    while page := held.page(after, 5):
        found += page
        after = key_of(page[-1].vote)
    assert found == list(held.votes()) and len(found) == 12


# --- the laws of union ---


@dataclass(frozen=True)
class Said:
    verifier: int
    subject: int
    sequence: int
    verdict: Verdict

    def signed(self) -> SignedVote:
        return _signed(self)


_CACHE: dict[Said, SignedVote] = {}


def _signed(said: Said) -> SignedVote:
    if said not in _CACHE:
        _CACHE[said] = signed_vote(
            VERIFIERS[said.verifier],
            PEERS[said.subject],
            sequence=said.sequence,
            verdict=said.verdict,
            issued=NOW + said.sequence,
            expires=NOW + said.sequence + 100,
        )
    return _CACHE[said]


# Some of them contradict each other: one number, two verdicts.
said = st.builds(
    Said,
    st.integers(0, 2),
    st.integers(0, 1),
    st.integers(1, 4),
    st.sampled_from([Verdict.OK, Verdict.BANNED]),
)
histories = st.lists(said, max_size=10)


def built(history: list[Said]) -> VoteSet:
    found = VoteSet(ELECTORATE)
    for one in history:
        refusal(lambda one=one: found.add(one.signed(), NOW + 50))
    return found


def merged(*sets: VoteSet) -> VoteSet:
    found = VoteSet(ELECTORATE)
    for one in sets:
        statements: list[SignedVote | Contradiction] = [*one.contradictions.values(), *one.votes()]
        for statement in statements:
            refusal(lambda statement=statement: found.take(statement, NOW + 50))
    return found


def view(held: VoteSet) -> Any:
    """All that a set amounts to."""
    verdicts = [held.verdict_of(peer, NOW + 50) for peer in PEERS]
    return held.digest(), set(held.contradictions), verdicts, list(map(held.is_banned, PEERS))


@given(histories, histories, histories)
@settings(max_examples=150)
def test_merging_is_commutative_associative_and_idempotent(
    a: list[Said], b: list[Said], c: list[Said]
) -> None:
    x, y, z = built(a), built(b), built(c)
    assert view(merged(x, y)) == view(merged(y, x))
    assert view(merged(merged(x, y), z)) == view(merged(x, merged(y, z)))
    assert view(merged(x, x)) == view(x)
    both = merged(x, y)
    assert view(merged(both, x)) == view(both)


@given(st.data(), histories)
@settings(max_examples=150)
def test_the_order_in_which_votes_come_does_not_matter(data: st.DataObject, history: list[Said]) -> None:
    shuffled = data.draw(st.permutations(history + history[:3]))
    assert view(built(history)) == view(built(shuffled))


@given(histories)
@settings(max_examples=80)
def test_is_banned_says_what_a_count_says(history: list[Said]) -> None:
    held = built(history)
    for peer in PEERS:
        bans = {
            verifier
            for verifier, signed in held.votes_on(peer, NOW + 50).items()
            if signed.vote.verdict is Verdict.BANNED and verifier not in held.contradictions
        }
        assert held.is_banned(peer) == (len(bans) >= ELECTORATE.quorum)


# --- on disk ---


def test_a_set_survives_the_disk(tmp_path: Path) -> None:
    held = set_of(signed_vote(), signed_vote(verdict=Verdict.OK))
    ban(held, VICTIM, [SECOND, THIRD], NOW)
    path = tmp_path / "folder" / "node.votes"
    vote_file.write(vote_file.archive(held), path)
    back = VoteSet(ELECTORATE)
    vote_file.load(back, path, NOW)
    assert view(back) == view(held)
    assert back.is_banned(VICTIM) and FIRST.peer_id in back.contradictions
    late = VoteSet(ELECTORATE)
    vote_file.load(late, path, NOW + TERM + 1)
    assert not list(late.votes()) and late.contradictions


def test_a_file_is_believed_no_more_than_a_stranger(tmp_path: Path) -> None:
    path = tmp_path / "node.votes"
    forged = [SignedVote.sign(make_vote(verifier), STRANGER) for verifier in VERIFIERS]
    path.write_bytes(wire.encode(vote_file.VoteArchive((*forged, signed_vote(FIRST)), ())))
    held = VoteSet(ELECTORATE)
    vote_file.load(held, path, NOW)
    assert list(held.votes()) == [signed_vote(FIRST)]


@given(st.binary(max_size=200))
@settings(max_examples=40)
def test_a_damaged_file_is_an_empty_one(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("votes") / "node.votes"
    path.write_bytes(content)
    held = VoteSet(ELECTORATE)
    vote_file.load(held, path, NOW)
    assert not list(held.votes())
