"""An exported ban list: what can be checked without a network, and that nothing else passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import ban_list
from protocol.ban_list import BanList, VoteRow, list_bans
from protocol.errors import UserError
from protocol.vote_set import VoteSet
from protocol.votes import Cause, Electorate, SignedVote, Verdict
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
from tests.protocol.strategies import mutated

FIRST, SECOND, THIRD = VERIFIERS
VICTIM, OTHER, DISPUTED, _ = PEERS


def a_set() -> VoteSet:
    """Two bans, in another order than that of the names; a third peer of whom one verifier thinks ill."""
    held = VoteSet(ELECTORATE)
    ban(held, OTHER, [THIRD, SECOND, FIRST], NOW + 3)
    ban(held, VICTIM, [SECOND, THIRD], NOW + 3)
    ban(held, DISPUTED, [FIRST], NOW + 3)
    return held


def exported(held: VoteSet | None = None) -> BanList:
    return list_bans(held or a_set(), NOW + 5)


def encoded(found: BanList) -> bytes:
    return msgspec.json.encode(found)


def plain(found: BanList) -> dict[str, Any]:
    content: dict[str, Any] = msgspec.json.decode(encoded(found))
    return content


def checked(content: bytes, electorate: Electorate = ELECTORATE) -> VoteSet:
    return ban_list.check(ban_list.parse(content, "a test"), electorate)


def problem(content: bytes, electorate: Electorate = ELECTORATE) -> str:
    with pytest.raises(UserError) as caught:
        checked(content, electorate)
    assert "\n" not in str(caught.value)
    return caught.value.problem


def test_what_is_exported_holds() -> None:
    found = exported()
    assert {row.peer: len(row.votes) for row in found.bans} == {VICTIM: 2, OTHER: 3}
    assert [(row.since, row.until) for row in found.bans] == [(NOW + 3, NOW + 3 + TERM)] * 2
    assert [(row.peer, row.verdict, len(row.votes)) for row in found.disputed] == [(DISPUTED, "ok", 1)]
    held = checked(encoded(found))
    assert held.is_banned(VICTIM) and held.is_banned(OTHER)
    assert checked(encoded(exported(VoteSet(ELECTORATE)))).verdicts() == {}


def test_a_ban_lasts_as_long_as_the_quorum() -> None:
    held = VoteSet(ELECTORATE)
    for late, verifier in enumerate(VERIFIERS):
        ban(held, VICTIM, [verifier], NOW + late)
    (row,) = list_bans(held, NOW + 5).bans
    assert (row.since, row.until) == (NOW + 1, NOW + 1 + TERM)


def test_a_verifier_that_lied_is_listed_with_its_lie() -> None:
    held = a_set()
    for verdict in (Verdict.BANNED, Verdict.OK):
        held.add(signed_vote(FIRST, VICTIM, verdict=verdict), NOW + 3)
    found = exported(held)
    assert [row.verifier for row in found.contradictions] == [FIRST.peer_id]
    assert not found.disputed, "its votes do not count"
    assert FIRST.peer_id in checked(encoded(found)).contradictions
    # Its vote cannot be slipped in beside the proof.
    vote = VoteRow.of(signed_vote(FIRST, VICTIM, sequence=7))
    bans = [
        msgspec.structs.replace(row, votes=(*row.votes, vote)) for row in found.bans if row.peer == VICTIM
    ]
    slipped = msgspec.structs.replace(found, bans=tuple(bans))
    assert "contradicted itself" in problem(encoded(slipped))


def _drop_a_vote(content: dict[str, Any]) -> None:
    content["bans"][0]["votes"].pop()


def _count_twice(content: dict[str, Any]) -> None:
    votes = content["bans"][0]["votes"]
    votes[:] = votes[:1] * 3


def _rename(content: dict[str, Any]) -> None:
    content["bans"][0]["peer"] = DISPUTED


def _reword(content: dict[str, Any]) -> None:
    content["bans"][0]["votes"][0]["text"] = "something else"


def _forge(content: dict[str, Any]) -> None:
    for votes in (row["votes"] for row in content["bans"]):
        forged = SignedVote.sign(make_vote(FIRST, VICTIM), STRANGER)
        votes.append(msgspec.to_builtins(VoteRow.of(forged)))


def _damage(content: dict[str, Any]) -> None:
    content["bans"][0]["votes"][0]["signed"] = "AAAA"


def _no_base64(content: dict[str, Any]) -> None:
    content["bans"][0]["votes"][0]["signed"] = "é!"


def _prolong(content: dict[str, Any]) -> None:
    content["bans"][0]["until"] += 1


def _outlive(content: dict[str, Any]) -> None:
    content["as_of"] += TERM


def _foresee(content: dict[str, Any]) -> None:
    content["as_of"] -= 100


def _invent(content: dict[str, Any]) -> None:
    content["bans"].append({**content["bans"][0], "peer": DISPUTED, "votes": []})


def _promote(content: dict[str, Any]) -> None:
    row = content["disputed"][0]
    ban_row = {"peer": DISPUTED, "stage": 1, "since": NOW + 3, "until": NOW + 3 + TERM, "votes": row["votes"]}
    content["bans"].append(ban_row)


def _frame(content: dict[str, Any]) -> None:
    rows = [msgspec.to_builtins(VoteRow.of(signed_vote(FIRST, VICTIM, sequence=number))) for number in (1, 2)]
    content["contradictions"].append({"verifier": FIRST.peer_id, "statements": rows})


@pytest.mark.parametrize(
    ("alter", "part"),
    [
        (_drop_a_vote, ("1 of the 2 votes",)),
        (_count_twice, ("1 of the 2 votes",)),
        (_rename, ("on another peer",)),
        (_reword, ("not what it signed",)),
        (_forge, ("bad_signature",)),
        (_damage, ("damaged",)),
        (_no_base64, ("damaged",)),
        (_prolong, ("its stage, times or votes",)),
        (_outlive, ("expired",)),
        (_foresee, ("too_early",)),
        (_invent, (DISPUTED, "0 of the 2")),
        (_promote, (DISPUTED, "1 of the 2")),
        (_frame, ("no contradiction",)),
    ],
)
def test_what_was_altered_does_not_hold(
    alter: Callable[[dict[str, Any]], None], part: tuple[str, ...]
) -> None:
    # The ban with two votes first, so that each of them is needed.
    content = plain(exported())
    content["bans"].sort(key=lambda row: len(row["votes"]))
    alter(content)
    said = problem(msgspec.json.encode(content))
    for one in part:
        assert one in said


def test_a_list_of_another_run_or_of_other_verifiers() -> None:
    data = encoded(exported())
    assert "another run" in problem(data, _electorate(run=b"x" * 32))
    assert "wrong_peer" in problem(data, _electorate(verifiers=frozenset([STRANGER.peer_id, FIRST.peer_id])))
    assert "2 of the 3 votes" in problem(data, _electorate(quorum=3))


def _electorate(**changes: Any) -> Electorate:
    content = {"run": ELECTORATE.run, "verifiers": ELECTORATE.verifiers, "quorum": 2, "term": TERM}
    return Electorate(**{**content, **changes})


@given(st.data())
@settings(max_examples=120)
def test_damage_is_the_users_error_or_harmless(data: st.DataObject) -> None:
    whole = encoded(exported())
    try:
        held = checked(data.draw(mutated(whole)))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert set(held.verdicts()) <= {VICTIM, OTHER}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"format": "x"}'])
def test_what_is_no_list(content: bytes) -> None:
    assert "no list of bans" in problem(content)


def test_a_ban_that_was_voted_down_is_not_listed() -> None:
    held = a_set()
    held.cast(SECOND, VICTIM, Verdict.OK, Cause.CLEARED, NOW + 4, stage=1, evidence=b"e" * 32)
    assert [row.peer for row in exported(held).bans] == [OTHER]
