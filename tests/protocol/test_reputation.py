"""Reputation: whose reports are believed, for how long, and that one verifier alone moves no median."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import reputation, wire
from protocol.errors import ProtocolError, Reason
from protocol.gossip import MAX_GOSSIP
from protocol.identity import Identity, PeerId
from protocol.reputation import (
    LIFETIME,
    MAX_ACCOUNTS,
    MAX_WORDS,
    Account,
    Reputation,
    ReputationBook,
    SignedReputation,
    read_reputation,
    table,
)
from protocol.votes import CLOCK_SLACK, MAX_TEXT, Verdict
from tests.protocol.ballots import ELECTORATE, NOW, PEERS, RUN, STRANGER, VERIFIERS
from tests.protocol.strategies import messages_of, mutated

PEER = PEERS[0]


def account(peer: PeerId = PEER, **changes: Any) -> Account:
    content: dict[str, Any] = {
        "stage": 1, "verdict": Verdict.OK, "samples": 10, "activation_flags": 0, "gradient_flags": 1,
        "log_evidence": -0.5, "throughput": 100.0, "uptime": 60.0, "words": ("as usual",),
    }  # fmt: skip
    return Account(peer, **{**content, **changes})


def report(
    verifier: Identity,
    *accounts: Account,
    signer: Identity | None = None,
    issued: int = NOW,
    run: bytes = RUN,
) -> bytes:
    said = Reputation(run, verifier.peer_id, issued, accounts)
    return wire.encode(SignedReputation.sign(said, signer or verifier))


def refusal(data: bytes) -> Reason | None:
    try:
        read_reputation(data, ELECTORATE, NOW)
    except ProtocolError as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (report(VERIFIERS[0], account()), None),
        (report(VERIFIERS[0], account(), run=b"x" * 32), Reason.FOREIGN_RUN),
        (report(STRANGER, account()), Reason.WRONG_PEER),
        (report(VERIFIERS[0], account(), signer=STRANGER), Reason.BAD_SIGNATURE),
        (report(VERIFIERS[0], account(), signer=VERIFIERS[1]), Reason.BAD_SIGNATURE),
        (report(VERIFIERS[0], account(), issued=NOW - LIFETIME - 1), Reason.EXPIRED),
        (report(VERIFIERS[0], account(), issued=NOW + CLOCK_SLACK + 1), Reason.TOO_EARLY),
        (report(VERIFIERS[0], account(words=("\x1b[2J",))), Reason.MALFORMED),
        (b"\x00" * (MAX_GOSSIP + 1), Reason.OVERSIZED),
        (b"", Reason.MALFORMED),
    ],
)
def test_which_reports_are_believed(data: bytes, reason: Reason | None) -> None:
    assert refusal(data) is reason


def test_the_longest_report_can_be_gossiped() -> None:
    big = 2**53
    longest = account(
        stage=4095, verdict=Verdict.QUARANTINED, samples=big, activation_flags=big, gradient_flags=big,
        words=("🦀" * MAX_TEXT,) * MAX_WORDS,
    )  # fmt: skip
    assert len(report(VERIFIERS[0], *[longest] * MAX_ACCOUNTS)) <= MAX_GOSSIP


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_report_is_refused_or_the_same(data: st.DataObject) -> None:
    whole = report(VERIFIERS[0], account())
    damaged = data.draw(mutated(whole))
    if refusal(damaged) is None:
        assert read_reputation(damaged, ELECTORATE, NOW) == read_reputation(whole, ELECTORATE, NOW)


@given(messages_of(SignedReputation))
@settings(max_examples=40)
def test_no_report_passes_by_chance(signed: SignedReputation) -> None:
    assert refusal(wire.encode(signed)) is not None


def test_one_verifier_does_not_move_the_median() -> None:
    book = ReputationBook(ELECTORATE)
    for verifier, samples, evidence, verdict in zip(
        VERIFIERS, (10, 12, 10**6), (0.5, 0.7, 1e9), (Verdict.OK, Verdict.OK, Verdict.BANNED), strict=True
    ):
        said = account(samples=samples, log_evidence=evidence, verdict=verdict)
        book.hear(report(verifier, said), NOW)
    standing = book.standings()[PEER]
    assert (standing.samples, standing.log_evidence, standing.verdict) == (12, 0.7, Verdict.OK)
    assert standing.verifiers == 3
    assert {one.samples for one in book.accounts_of(PEER).values()} == {10, 12, 10**6}
    assert book.standings(excluded=[VERIFIERS[2].peer_id])[PEER].samples == 11


def test_of_two_the_milder_verdict_shows() -> None:
    pair = [account(verdict=Verdict.BANNED), account(verdict=Verdict.SUSPECT)]
    assert table(pair)[PEER].verdict is Verdict.SUSPECT
    assert table([]) == {}


def test_the_latest_account_counts_and_an_old_one_is_forgotten() -> None:
    book = ReputationBook(ELECTORATE)
    book.hear(report(VERIFIERS[0], account(samples=5), issued=NOW), NOW)
    book.hear(report(VERIFIERS[0], account(samples=4), issued=NOW - 1), NOW)
    book.hear(report(VERIFIERS[0], account(PEERS[1]), issued=NOW + 1), NOW + 1)
    assert book.standings()[PEER].samples == 5
    book.advance(NOW + LIFETIME + 1)
    assert set(book.standings()) == {PEERS[1]}


def test_the_book_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reputation, "MAX_SUBJECTS", 2)
    book = ReputationBook(ELECTORATE)
    book.hear(report(VERIFIERS[0], *map(account, PEERS)), NOW)
    assert set(book.standings()) == set(PEERS[:2])
    book.hear(report(VERIFIERS[0], account(samples=99), issued=NOW + 1), NOW + 1)
    assert book.standings()[PEER].samples == 99
