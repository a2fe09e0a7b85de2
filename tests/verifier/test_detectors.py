"""Whole detectors on synthetic streams: who is banned, and who is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from protocol.errors import UserError
from protocol.votes import Verdict
from tests.verifier.streams import NoCourt, Stage, hops
from verifier.audit import agrees
from verifier.detector import Detector, Hearing
from verifier.duplicate import Duplicate
from verifier.marginal import Marginal, MarginalSettings
from verifier.registry import make_detector
from verifier.sentinel import Sentinel, Settings
from verifier.streams import Hops

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PEERS = [f"1/{replica}" for replica in range(8)]


def corrupted(kind: str, outputs: Tensor, bad: slice, generator: torch.Generator) -> Tensor:
    sent = outputs.clone()
    noise = torch.randn(outputs.shape, generator=generator)
    change = {
        "nothing": outputs,
        "zeros": torch.zeros_like(outputs),
        "flip": -outputs,
        "noise": outputs + 0.3 * noise,
        "half the tokens": torch.where(torch.arange(outputs.shape[2])[:, None] % 2 == 0, outputs, noise),
    }[kind]
    sent[bad] = change[bad]
    return sent


def play(detector: Detector, kind: str, rounds: int, start: int, attackers: int = 3) -> list[tuple[str, int]]:
    """Bans, with their rounds, of a stage of 8 whose first `attackers` corrupt from `start` on."""
    stage, court, bans = Stage(), NoCourt(8), []
    generator = torch.Generator().manual_seed(1)
    for round in range(rounds):
        x = stage.inputs(8)
        bad = slice(0, attackers if round >= start else 0)
        judgement = detector.judge(
            hops(x, corrupted(kind, stage.outputs(x), bad, generator), round, PEERS), court
        )
        bans += [(ban.peer, ban.round) for ban in judgement.bans]
    return bans


@pytest.mark.parametrize("kind", ["zeros", "flip", "noise", "half the tokens"])
def test_screening_alone_bans_the_attackers_and_nobody_else(kind: str) -> None:
    bans = play(Sentinel(Settings(recompute=0)), kind, rounds=80, start=60)
    assert sorted(peer for peer, _ in bans) == PEERS[:3]
    assert max(round for _, round in bans) < 75


def test_nobody_is_banned_without_an_attack() -> None:
    assert play(Sentinel(), "nothing", rounds=300, start=0) == []


@pytest.mark.parametrize("kind", ["zeros", "flip", "noise", "half the tokens"])
def test_an_attack_from_the_first_round_on_is_found_too(kind: str) -> None:
    bans = play(Sentinel(Settings(recompute=0)), kind, rounds=60, start=0)
    assert sorted(peer for peer, _ in bans) == PEERS[:3]
    assert max(round for _, round in bans) < 40


def test_retries_among_attackers_do_not_make_the_baseline_start_anew() -> None:
    detector, stage, court = Sentinel(Settings(recompute=0)), Stage(), NoCourt(8)
    for round in range(60):
        x = stage.inputs(8)
        detector.judge(hops(x, stage.outputs(x), round, PEERS), court)
    for round in range(60, 63):
        x = stage.inputs(8)
        zeros = torch.zeros_like(x[:3])
        assert (
            detector.judge(hops(x, torch.cat([zeros, stage.outputs(x)[3:]]), round, PEERS), court)
            .refused[:3]
            .all()
        )
        for _ in range(4):
            # Retries that chance gives to attackers alone, and one honest peer.
            retried = detector.judge(hops(x[:3], zeros, round, PEERS[:3]), court)
            assert retried.refused.all(), f"round {round}: {retried.refused}"
            detector.judge(hops(x[3:4], stage.outputs(x[3:4]), round, PEERS[3:4]), court)


def test_a_majority_that_is_forgiven_does_not_leave_attackers_to_be_trusted_alone() -> None:
    detector, stage, court = Sentinel(Settings(recompute=0)), Stage(), NoCourt(8)
    generator = torch.Generator().manual_seed(1)
    for round in range(60):
        x = stage.inputs(8)
        detector.judge(hops(x, stage.outputs(x), round, PEERS), court)
    # Held against the attackers and one honest peer: nearly enough for a ban; against three more: half of it.
    for peers, share in ((PEERS[:4], 0.8), (PEERS[4:7], 0.5)):
        raise_evidence(detector, peers, share * -np.log(Settings().alpha))
    for round in range(60, 66):
        x = stage.inputs(8)
        outputs = torch.cat([torch.randn(x[:3].shape, generator=generator), stage.outputs(x)[3:]])
        judgement = detector.judge(hops(x, outputs, round, PEERS), court)
        assert judgement.refused.tolist() == [True] * 3 + [False] * 5, f"round {round}"


def raise_evidence(detector: Sentinel, peers: list[str], nats: float) -> None:
    """Have the peers win bets until so much is held against them."""
    rows = detector._roster.rows(tuple(peers))
    won = np.abs(detector._losses) / 10
    while detector.standing(peers[0]).log_evidence < nats:
        detector._capital.bet(rows, 1, np.broadcast_to(won, (len(rows), *won.shape)))


def test_an_odd_text_is_held_against_the_first_who_had_it_alone() -> None:
    detector, stage, court = Sentinel(Settings(recompute=0)), Stage(), NoCourt(20)
    peers = [f"1/{replica}" for replica in range(20)]
    for round in range(60):
        x = stage.inputs(20)
        detector.judge(hops(x, stage.outputs(x), round, peers), court)
    evidence = {peer: detector.standing(peer).log_evidence for peer in peers}
    odd = 30 * stage.inputs(1)
    for peer in peers[:12]:
        refused = detector.judge(hops(odd, stage.outputs(odd), 60, [peer]), court).refused
        # With the tenth, as many say the same as attackers can never be.
        assert refused.all() == (peers.index(peer) < 9), peer
    gained = [detector.standing(peer).log_evidence - evidence[peer] for peer in peers[:12]]
    assert max(gained) < 0.1, gained


def test_a_head_that_sends_noise_of_the_right_size_is_found_by_its_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(50, 16, generator=generator)
    detector, court, bans = Sentinel(Settings(recompute=0)), NoCourt(8), set()
    for round in range(60):
        tokens = torch.randint(50, (8, 2, 24), generator=generator)
        context = torch.randn(8, 2, 24, 16, generator=generator)
        sent = embedding[tokens] + 0.5 * context
        if round >= 40:
            sent[0] = sent[0].std() * torch.randn(sent[0].shape, generator=generator)
        bans |= {ban.peer for ban in detector.judge(hops(tokens, sent, round, PEERS), court).bans}
    assert bans == {"1/0"}


def test_more_than_a_minority_is_not_banned_without_a_hearing_except_on_twice_the_evidence() -> None:
    detector, stage, court, banned = Sentinel(), Stage(), NoCourt(8), {}
    quarantined = 0
    for round in range(100):
        peers = [peer for peer in PEERS if peer not in banned]
        x = stage.inputs(len(peers))
        sent = stage.outputs(x)
        for place, peer in enumerate(peers):
            if round >= (60 if peer in PEERS[:3] else 75) and peer in PEERS[:4]:
                sent[place] *= -1
        judgement = detector.judge(hops(x, sent, round, peers), court)
        for ban in judgement.bans:
            banned[ban.peer] = round
            court.replicas -= 1
        fourth = detector.standing(PEERS[3])
        if fourth.log_evidence > 6.91 and PEERS[3] not in banned:
            quarantined += 1
            assert fourth.verdict is Verdict.QUARANTINED and judgement.refused[peers.index(PEERS[3])]
    assert list(banned) == [*sorted(PEERS[:3], key=banned.__getitem__), PEERS[3]]
    assert max(banned[peer] for peer in PEERS[:3]) < 75
    assert quarantined >= 1
    assert detector.standing(PEERS[3]).log_evidence >= 2 * 6.9


class AcquittingCourt(NoCourt):
    """Finds everyone innocent, at a price."""

    def most(self, hops: Hops) -> float:
        return 7.0

    def hear(self, hops: Hops, row: int) -> Hearing:
        return Hearing(False, 1.0)

    def doubt(self, hops: Hops, row: int) -> Hearing:
        return Hearing(False, 1.0)


def test_nobody_is_banned_for_what_a_recomputation_confirms() -> None:
    """All the money there is goes to those who would be banned, and they are not."""
    detector = Sentinel(Settings(recompute=0.2))
    assert play(detector, "nothing", rounds=50, start=0) == []
    stage, court, bans = Stage(seed=1), AcquittingCourt(8), []
    generator = torch.Generator().manual_seed(2)
    for round in range(50, 90):
        x = stage.inputs(8)
        sent = corrupted("noise", stage.outputs(x), slice(0, 1), generator)
        bans += detector.judge(hops(x, sent, round, PEERS), court).bans
    assert bans == []
    assert detector.standing("1/0").audits > 5


def test_one_hop_at_a_time_with_three_replicas_is_enough() -> None:
    detector, stage, court = Sentinel(Settings(recompute=0)), Stage(), NoCourt(3)
    bans: list[str] = []
    for round in range(400):
        x = stage.inputs(1)
        peer = f"1/{round % 3}"
        sent = stage.outputs(x) * (-1 if peer == "1/2" and round >= 300 else 1)
        bans += [ban.peer for ban in detector.judge(hops(x, sent, round, [peer]), court).bans]
    assert bans == ["1/2"]
    assert detector.standing("1/2").verdict is Verdict.BANNED
    assert detector.standing("1/0").verdict is Verdict.OK


def test_what_is_missing_or_not_finite_is_refused_and_counts() -> None:
    detector, stage, court = Sentinel(Settings(recompute=0)), Stage(), NoCourt(8)
    bans: list[str] = []
    for round in range(60):
        x = stage.inputs(8)
        sent = stage.outputs(x)
        one = hops(x, sent, round, PEERS)
        if round >= 40:
            sent[0, 0, 0, 0] = torch.nan
            one.delivered[1] = False
        judgement = detector.judge(one, court)
        bans += [ban.peer for ban in judgement.bans]
        if round >= 40:
            assert judgement.refused[:2].all()
    assert set(bans) == {"1/0", "1/1"}


def test_the_guard_sees_gross_outliers_in_single_tensors() -> None:
    detector, stage = Sentinel(), Stage()
    play(detector, "nothing", rounds=40, start=0)
    x = stage.inputs(2)
    sent = stage.outputs(x)
    sent[1] *= 30
    assert detector.guard(hops(x, sent, 41, PEERS[:2])).tolist() == [False, True]


class FullCourt(NoCourt):
    """Recomputes with the stage's own map, and remembers what it cost."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(8)
        self.stage = stage
        self.spent = 0.0

    def most(self, hops: Hops) -> float:
        return 7.0

    def hear(self, hops: Hops, row: int) -> Hearing:
        assert hops.inputs is not None
        guilty = not agrees(hops.outputs[row], self.stage.outputs(hops.inputs[row]))
        cost = 4.0 if guilty else 1.0
        self.spent += cost
        return Hearing(guilty, cost)


def test_recomputation_finds_what_screening_cannot_and_stays_in_its_budget() -> None:
    stage, detector = Stage(), Sentinel()
    court, bans = FullCourt(stage), set()
    for round in range(700):
        x = stage.inputs(8)
        sent = stage.outputs(x)
        sent[0] += 0.02 * sent[0].std() * torch.randn(sent[0].shape, generator=stage.generator)
        bans |= {ban.peer for ban in detector.judge(hops(x, sent, round, PEERS), court).bans}
        assert court.spent <= 0.01 * 8 * (round + 1)
    assert bans == {"1/0"}


def test_state_is_bounded_whatever_the_number_of_peers() -> None:
    detector, stage, court = Sentinel(Settings(peers=16)), Stage(), NoCourt(8)
    for round in range(20):
        x = stage.inputs(8)
        peers = [f"1/{8 * round + replica}" for replica in range(8)]
        detector.judge(hops(x, stage.outputs(x), round, peers), court)
    assert detector.standing("1/0").samples == 0
    assert detector.standing("1/159").samples == 1


def test_the_papers_detector_sees_marginals_and_misses_random_signs() -> None:
    settings = MarginalSettings(warmup=60)
    bans = play(Marginal(settings), "zeros", rounds=80, start=60)
    assert sorted(peer for peer, _ in bans) == PEERS[:3]
    assert {peer for peer, _ in play(Marginal(settings), "nothing", rounds=200, start=0)} == set()


def test_duplicate_refuses_exactly_what_differs() -> None:
    stage = Stage()
    x = stage.inputs(3)
    sent = stage.outputs(x)
    sent[1] += 1
    judgement = Duplicate().judge(hops(x, sent, 0, PEERS[:3]), FullCourt(stage))
    assert judgement.refused.tolist() == [False, True, False]
    assert [ban.peer for ban in judgement.bans] == ["1/1"]


def test_detectors_by_name_and_the_example_of_the_docs() -> None:
    for spec in ("sentinel", "marginal", "none", "duplicate", "sentinel:no-ema,counter,alpha=0.01"):
        assert isinstance(make_detector(spec), Detector)
    own = make_detector(f"{EXAMPLES / 'my_detector.py'}:NormWatch")
    bans = play(own, "zeros", rounds=20, start=10)
    assert sorted({peer for peer, _ in bans}) == PEERS[:3]


@pytest.mark.parametrize(
    "spec", ["", "sentinal", "sentinel:no-such", "sentinel:alpha=2", "none:x", "no.py:A"]
)
def test_a_wrong_detector_says_what_to_write(spec: str) -> None:
    with pytest.raises(UserError):
        make_detector(spec)


def test_evidence_is_the_same_however_hops_are_batched_in_a_round() -> None:
    stage = Stage()
    x = stage.inputs(8)
    y = stage.outputs(x)
    together, apart = Sentinel(), Sentinel()
    for detector in (together, apart):
        play(detector, "nothing", rounds=30, start=0)
    order = np.array([3, 1, 0, 2, 7, 5, 6, 4])
    whole = hops(x, y, 30, PEERS)
    together.judge(whole, NoCourt(8))
    apart.judge(whole.take(order), NoCourt(8))
    for peer in PEERS:
        assert together.standing(peer).log_evidence == pytest.approx(apart.standing(peer).log_evidence)
