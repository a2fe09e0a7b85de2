"""What a verifier thinks after panels: gross corruption stands out at once, strays are not taken for liars."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from protocol.identity import Identity, PeerId
from protocol.receipts import Direction, MicrobatchId
from protocol.votes import Cause, Verdict
from tests.verifier.streams import Stage
from verifier.bench import Bench
from verifier.exhibits import Exhibit, Work
from verifier.sentinel import Settings
from verifier.tribunal import Finding

PEERS = [Identity.generate().peer_id for _ in range(3)]
OURS, THEIRS = b"stage ok", b"strayed!"


def panel(stage: Stage, number: int, corrupt: float | None, state: bytes = OURS) -> list[Work]:
    """One work of each replica of a stage; the first one's is scaled by `corrupt`."""
    from tests.verifier.exhibits import Trip

    trip = Trip()
    template = trip.show(2, Direction.ACTIVATION)
    works = []
    for place, peer in enumerate(PEERS):
        inputs = stage.inputs(1)[0][:1]
        outputs = stage.outputs(inputs)
        if place == 0 and corrupt is not None:
            outputs = corrupt * outputs
        microbatch = MicrobatchId(trip.peer(0), 100 * number + place)
        receipt = replace_receipt(template, peer, microbatch)
        works.append(Work(peer, 1, Direction.ACTIVATION, 0, state, *exhibits(receipt, inputs, outputs)))
    return works


def replace_receipt(template: Exhibit, peer: PeerId, microbatch: MicrobatchId) -> Exhibit:
    import msgspec

    receipt = msgspec.structs.replace(template.receipt, sender=peer, microbatch=microbatch)
    return replace(template, signed=msgspec.structs.replace(template.signed, receipt=receipt))


def exhibits(
    template: Exhibit, inputs: torch.Tensor, outputs: torch.Tensor
) -> tuple[Exhibit, Exhibit, Exhibit]:
    source = replace(template, tensor=inputs)
    return replace(template, tensor=outputs), source, source


@pytest.mark.parametrize("corrupt", [0.0, -1.0, 3.0])
def test_the_first_panel_shows_who_is_odd_and_a_finding_bans(corrupt: float) -> None:
    bench = Bench(Settings(recompute=0.0))
    works = panel(Stage(), 1, corrupt)
    screening = bench.screen(works, 1, 3)
    assert bench.worth_hearing(screening, works, ())[0] == 0
    bench.record(screening, works, {0: Finding(True, 2, 1.0, OURS)}, 0.0)
    opinion = bench.opinion(PEERS[0], 0.0)
    assert opinion.verdict is Verdict.BANNED and opinion.cause is Cause.RECOMPUTED
    assert "got something else" in opinion.text
    assert all(bench.opinion(peer, 0.0).verdict is Verdict.OK for peer in PEERS[1:])


def test_who_had_said_that_its_weights_are_others_is_not_banned() -> None:
    bench, stage = Bench(Settings(recompute=0.0)), Stage()
    for number in range(1, 6):
        works = panel(stage, number, -1.0, THEIRS)
        screening = bench.screen(works, number, 3)
        bench.record(screening, works, {0: Finding(True, 2, 2.0, OURS)}, 4.0 * number)
    assert bench.opinion(PEERS[0], 20.0).verdict is Verdict.QUARANTINED
    assert bench.opinion(PEERS[0], 20.0).cause is Cause.RECOMPUTED


def test_who_replaced_labels_is_banned_by_its_own_receipts_without_a_hearing() -> None:
    bench = Bench(Settings(recompute=0.0))
    works = panel(Stage(), 1, None)
    others = bytes(len(works[0].output.labels))
    works[0] = replace(works[0], output=replace(works[0].output, labels=others))
    bench.record(bench.screen(works, 1, 3), works, {}, 0.0)
    opinion = bench.opinion(PEERS[0], 0.0)
    assert opinion.verdict is Verdict.BANNED and opinion.cause is Cause.RECEIPTS and "labels" in opinion.text
    assert all(bench.opinion(peer, 0.0).verdict is Verdict.OK for peer in PEERS[1:])


def test_of_many_odd_works_one_is_heard_and_what_was_flagged_in_any_case() -> None:
    bench, stage = Bench(Settings(recompute=0.0)), Stage()
    works = panel(stage, 1, None) + panel(stage, 2, 3.0) + panel(stage, 3, 2.0)
    screening = bench.screen(works, 1, 3)
    assert {3, 6} < set(np.flatnonzero(screening.odd))
    assert bench.worth_hearing(screening, works, ()) == [3]
    accused = bench.worth_hearing(screening, works, {PEERS[0]})
    assert accused[0] == 3 and len(accused) == 2 and works[accused[1]].peer != PEERS[0]
    flagged = works[0].receipt.microbatch
    assert set(bench.worth_hearing(screening, works, {PEERS[0]}, {flagged})) == {*accused, 0}


def test_other_labels_are_not_excused_by_other_weights() -> None:
    bench = Bench(Settings(recompute=0.0))
    works = panel(Stage(), 1, None, THEIRS)
    finding = Finding(True, 2, 0.0, OURS, is_relabelled=True)
    bench.record(bench.screen(works, 1, 3), works, {0: finding}, 0.0)
    opinion = bench.opinion(PEERS[0], 0.0)
    assert opinion.verdict is Verdict.BANNED and "other labels" in opinion.text


def test_honest_panels_leave_everybody_alone() -> None:
    bench, stage = Bench(Settings(recompute=0.0)), Stage()
    asked = 0
    for number in range(1, 61):
        works = panel(stage, number, None)
        screening = bench.screen(works, number, 3)
        wanted = bench.worth_hearing(screening, works, ())
        asked += len(wanted)
        bench.record(screening, works, {place: Finding(False, 1) for place in wanted}, float(number))
    assert {bench.opinion(peer, 60.0).verdict for peer in PEERS} == {Verdict.OK}
    assert asked <= 0.2 * 3 * 60
    assert np.all([bench.opinion(peer, 60.0).samples == 60 for peer in PEERS])
