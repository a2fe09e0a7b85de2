"""What is drawn, from whom, and what is held against whom does not answer."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from protocol.identity import Identity, PeerId
from protocol.receipts import Direction, MicrobatchId
from protocol.samples import DRAWN_WITHIN, Passage
from protocol.votes import Verdict
from verifier.conduct import STRAY_FORGOTTEN, Conduct
from verifier.sampling import MAX_KNOWN, SPEAK_WITHIN, Allowance, Traffic

STAGES, REPLICAS = 3, 3
PEERS = [[Identity.generate().peer_id for _ in range(REPLICAS)] for _ in range(STAGES)]
Path = list[PeerId]


def pass_on(
    traffic: Traffic, slot: int, path: Path, now: float = 0.0, flagged_at: int | None = None, silent: int = -1
) -> MicrobatchId:
    """Everybody on the way but `silent` says what passed; from `flagged_at` on nobody had it."""
    microbatch = MicrobatchId(path[0], slot)
    for stage, peer in enumerate(path):
        if flagged_at is not None and stage > flagged_at:
            break
        if stage == silent:
            continue
        flagged = Direction.ACTIVATION if stage == flagged_at else None
        after = path[stage + 1] if stage + 1 < STAGES and flagged is None else None
        passage = Passage(microbatch, path[stage - 1] if stage else None, after, 3, flagged, b"weights!")
        traffic.take(peer, stage, [passage], now, now)
    return microbatch


def busy(generator: random.Random, count: int = 200) -> Traffic:
    traffic = Traffic(STAGES)
    for slot in range(count):
        pass_on(traffic, slot, [generator.choice(stage) for stage in PEERS])
    return traffic


EVERYBODY = {peer for stage in PEERS for peer in stage}


def test_a_panel_covers_every_replica_with_few_microbatches() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        panel = busy(generator).draw(generator, 1.0, most=9)
        assert set().union(*(one.peers for one in panel)) == EVERYBODY
        assert len(panel) <= 2 * REPLICAS


@pytest.mark.parametrize("new", [[], PEERS[0]])
def test_one_microbatch_more_than_replicas_nearly_always_covers_them(new: Path) -> None:
    covered = 0
    for seed in range(20):
        generator = random.Random(seed)
        panel = busy(generator).draw(generator, 1.0, most=REPLICAS + 1, wanted=dict.fromkeys(new, 0.5))
        covered += set().union(*(one.peers for one in panel)) == EVERYBODY
    assert covered >= 18  # It is drawn by lot.


def test_a_panel_is_drawn_by_the_verifiers_own_randomness() -> None:
    drawn = set()
    for seed in range(10):
        traffic = busy(random.Random(0))
        drawn.add(tuple(str(one.microbatch) for one in traffic.draw(random.Random(seed), 1.0, most=4)))
    assert len(drawn) == 10


def test_nothing_is_drawn_twice_or_too_late() -> None:
    generator = random.Random(1)
    traffic = busy(generator, 20)
    first = traffic.draw(generator, 1.0, most=4)
    again = traffic.draw(generator, 1.0, most=4)
    assert first and again and not {one.microbatch for one in first} & {one.microbatch for one in again}
    assert not traffic.draw(generator, DRAWN_WITHIN + 1, most=4)


def test_of_what_is_told_at_once_the_latest_is_looked_at_first() -> None:
    """Who begins to cheat is seen in the first panel, though verifiers ask seldom."""
    path = [stage[0] for stage in PEERS]
    passages = [
        Passage(MicrobatchId(path[0], slot), path[0], path[2], 3, None, b"weights!") for slot in range(100)
    ]
    drawn = []
    for seed in range(50):
        traffic = Traffic(STAGES)
        for stage, peer in enumerate(path):
            traffic.take(peer, stage, passages, 0.0, 4.0)
        drawn += [one.microbatch.slot for one in traffic.draw(random.Random(seed), 4.0, most=1)]
    assert sum(slot >= 50 for slot in drawn) > 30 and min(drawn) < 50 < max(drawn)


@pytest.mark.parametrize(("ago", "is_drawn"), [(DRAWN_WITHIN - 1, True), (DRAWN_WITHIN + 1, False)])
def test_what_its_first_holder_will_soon_have_forgotten_is_not_drawn(ago: float, is_drawn: bool) -> None:
    """Though it is told only now: an honest node might not be able to show it any more."""
    path, now = [stage[0] for stage in PEERS], 100.0
    first, *later = (
        Passage(MicrobatchId(path[0], slot), path[0], path[2], 3, None, b"weights!") for slot in range(100)
    )
    traffic = Traffic(STAGES)
    traffic.take(path[2], 2, [first, *later], now - ago, now)
    for stage in (0, 1):
        traffic.take(path[stage], stage, [first], now - 1, now)
    assert bool(traffic.draw(random.Random(1), now, most=1)) is is_drawn


def test_who_was_not_heard_for_long_is_not_looked_at_less_for_it() -> None:
    path = [stage[0] for stage in PEERS]
    traffic = Traffic(STAGES)
    for stage, peer in enumerate(path):
        passage = Passage(MicrobatchId(path[0], 1), path[0], path[2], 3, None, b"weights!")
        traffic.take(peer, stage, [passage] * 2, 0.0, 1e6)
    assert traffic.draw(random.Random(1), 1e6, most=1)


def test_the_accused_are_looked_at_first_and_twice() -> None:
    generator = random.Random(2)
    accused = PEERS[1][2]
    for _ in range(10):
        panel = busy(generator).draw(generator, 1.0, most=5, wanted={accused: 2.0})
        assert sum(accused in one.path.values() for one in panel) >= 2


def test_an_alarm_names_the_sender_and_is_drawn_though_its_way_ended() -> None:
    generator = random.Random(3)
    traffic = busy(generator)
    path = [stage[0] for stage in PEERS]
    microbatch = pass_on(traffic, 999, path, flagged_at=2)
    (alarm,) = traffic.alarms(1.0)
    assert alarm.microbatch == microbatch and alarm.flagged == {(2, Direction.ACTIVATION): path[1]}
    panel = traffic.draw(generator, 1.0, most=5, start=alarm)
    assert panel[0] is alarm and len(panel) > 1
    assert not traffic.alarms(1.0)


def test_a_fresh_alarm_is_drawn_rather_than_an_old_one_and_any_may_be() -> None:
    traffic, generator = Traffic(STAGES), random.Random(4)
    path = [stage[0] for stage in PEERS]
    old, fresh = (pass_on(traffic, slot, path, now, flagged_at=2) for slot, now in ((1, 0.0), (2, 2.0)))
    drawn = Counter(alarm.microbatch for _ in range(500) if (alarm := traffic.draw_alarm(generator, 3.0)))
    assert drawn[fresh] > 2 * drawn[old] > 0
    assert traffic.draw_alarm(generator, 100.0) is None


def test_who_does_not_speak_for_itself_is_waited_for_and_then_looked_at_all_the_same() -> None:
    generator = random.Random(4)
    traffic = Traffic(STAGES)
    path = [stage[0] for stage in PEERS]
    pass_on(traffic, 1, path, silent=1)
    assert not traffic.draw(generator, 1.0, most=4)
    (late,) = traffic.draw(generator, SPEAK_WITHIN + 1, most=4)
    assert late.path[1] == path[1] and path[1] not in late.states


def test_what_is_remembered_is_bounded() -> None:
    traffic = Traffic(STAGES)
    for slot in range(MAX_KNOWN + 50):
        pass_on(traffic, slot, [stage[0] for stage in PEERS])
    assert len(traffic._journeys) == MAX_KNOWN


def test_an_allowance_is_saved_up_to_its_limit() -> None:
    allowance = Allowance(limit=4.0, saved=0.0)
    assert not allowance.can_pay(1.0)
    allowance.earn(10.0)
    allowance.pay(3.0)
    assert allowance.can_pay(1.0) and not allowance.can_pay(1.5)


def test_who_refuses_is_suspected_then_quarantined_and_never_banned() -> None:
    conduct = Conduct()
    seen = []
    for _ in range(50):
        conduct.fail("peer", "does not show")
        seen.append(conduct.verdict("peer", 0.0))
    assert seen[:4] == [Verdict.OK, Verdict.SUSPECT, Verdict.SUSPECT, Verdict.QUARANTINED]
    assert Verdict.BANNED not in seen


def test_who_refuses_one_in_three_is_found_out_and_one_in_ten_is_not() -> None:
    for share, expected in ((3, Verdict.QUARANTINED), (10, Verdict.OK)):
        conduct = Conduct()
        for number in range(1, 61):
            if number % share == 0:
                conduct.fail("peer", "does not show")
            else:
                conduct.please("peer")
        assert conduct.verdict("peer", 0.0) is expected


def test_who_strays_for_long_is_quarantined_and_who_comes_back_is_not() -> None:
    conduct = Conduct()
    for now in (0.0, 2.0, 4.0):
        conduct.stray("peer", now)
    assert conduct.verdict("peer", 4.0) is Verdict.SUSPECT
    conduct.return_to_fold("peer")
    assert conduct.verdict("peer", 5.0) is Verdict.OK
    for now in (10.0, 15.0, 21.0):
        conduct.stray("peer", now)
        conduct.please("peer")
    assert conduct.verdict("peer", 21.0) is Verdict.QUARANTINED
    assert conduct.reason("peer", 21.0)[1] == "works with other weights than its stage"
    assert conduct.verdict("peer", 21.0 + STRAY_FORGOTTEN + 1) is Verdict.OK
