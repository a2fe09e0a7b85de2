"""Nobody can frame a neighbour: what is shown must be what its sender signed, and hang together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity
from protocol.receipts import Direction
from tests.verifier.exhibits import HEADER, LABELS, SEQUENCES, Trip
from verifier.exhibits import Exposure, read_exhibit, works_of

ACTIVATION, GRADIENT = Direction.ACTIVATION, Direction.GRADIENT


@pytest.mark.parametrize("sequence", range(SEQUENCES))
def test_an_honest_way_gives_every_stages_work(sequence: int) -> None:
    trip = Trip()
    shown = {key: trip.show(*key, sequence) for key in trip.sent}
    works, exposures = works_of(shown, 3, sequence, {trip.peer(1): b"weights!"})
    assert not exposures
    found = {(work.stage, work.direction): work for work in works}
    assert set(found) == {(0, ACTIVATION), (1, ACTIVATION), (1, GRADIENT), (2, GRADIENT)}
    middle = found[1, GRADIENT]
    assert middle.peer == trip.peer(1) and middle.state == b"weights!" and middle.sequence == sequence
    assert middle.source is not None and middle.forward is not None
    assert torch.equal(middle.source.tensor, shown[1, GRADIENT].tensor)
    assert torch.equal(middle.forward.tensor, shown[1, ACTIVATION].tensor)
    assert found[2, GRADIENT].source is None and found[0, ACTIVATION].forward is None
    assert found[2, GRADIENT].state is None


Forge = Callable[[Trip, bytearray], None]

FORGERIES: dict[str, tuple[Forge, Reason]] = {
    "another tensor": (lambda trip, blob: blob.__setitem__(32 * 3 + 5, blob[32 * 3 + 5] ^ 1), Reason.WRONG_DIGEST),
    "another leaf": (lambda trip, blob: blob.__setitem__(3, blob[3] ^ 1), Reason.WRONG_DIGEST),
    "other labels": (lambda trip, blob: blob.__setitem__(-1, blob[-1] ^ 1), Reason.WRONG_DIGEST),
    "less": (lambda trip, blob: blob.__delitem__(-1), Reason.MALFORMED),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_what_a_receipt_does_not_name_cannot_be_shown(name: str) -> None:
    trip, (forge, reason) = Trip(), FORGERIES[name]
    held = trip.sent[2, ACTIVATION]
    blob = bytearray(held.blob(0))
    forge(trip, blob)
    with pytest.raises(ProtocolError) as caught:
        read_exhibit(trip.question(2, ACTIVATION), held.signed, memoryview(blob), HEADER)
    assert caught.value.reason is reason


def test_another_sequence_than_was_asked_for_cannot_be_shown() -> None:
    trip = Trip()
    held = trip.sent[1, GRADIENT]
    with pytest.raises(ProtocolError) as caught:
        read_exhibit(trip.question(1, GRADIENT, 0), held.signed, held.blob(1), HEADER)
    assert caught.value.reason is Reason.WRONG_DIGEST


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": b"x" * 32}, Reason.FOREIGN_RUN),
        ({"microbatch": Trip().microbatch}, Reason.UNSOLICITED),
        ({"recipient": Identity.generate().peer_id}, Reason.WRONG_PEER),
        ({"stage": 2}, Reason.WRONG_STAGE),
        ({"signer": Identity.generate()}, Reason.BAD_SIGNATURE),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_tensor_that_the_neighbour_never_made_cannot_be_blamed_on_it(
    changes: dict[str, object], reason: Reason
) -> None:
    trip = Trip()
    trip.send(0, 1, ACTIVATION, made_of=b"t" * 32, **changes)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError) as caught:
        trip.show(1, ACTIVATION)
    assert caught.value.reason is reason


@pytest.mark.parametrize("direction", Direction)
def test_who_shows_another_input_than_it_swore_to_exposes_itself(direction: Direction) -> None:
    """Even with a colluding neighbour that signs whatever is wanted, after the fact."""
    trip = Trip()
    sender = 0 if direction is ACTIVATION else 2
    made_of = b"t" * 32 if direction is ACTIVATION else trip.output_digest(2, ACTIVATION)
    trip.send(sender, 1, direction, made_of=made_of)
    works, exposures = works_of(trip.show_all(), 3, 0, {})
    assert [(one.peer, one.stage) for one in exposures if isinstance(one, Exposure)] == [(trip.peer(1), 1)]
    assert not any(work.peer == trip.peer(1) and work.direction is direction for work in works)


def test_a_tail_swears_to_the_activation_that_it_was_sent() -> None:
    trip = Trip()
    trip.send(2, 1, GRADIENT, made_of=b"x" * 32)
    _, exposures = works_of(trip.show_all(), 3, 0, {})
    assert (trip.peer(2), 2) in [(one.peer, one.stage) for one in exposures]


def test_colluding_neighbours_that_show_a_clean_pair_are_judged_by_it() -> None:
    """Stage 1 sends garbage; stage 0 signs a clean tensor for it. Then stage 1's output must follow from that one."""
    trip = Trip()
    clean = torch.ones(HEADER.shape)
    trip.send(0, 1, ACTIVATION, tensor=clean, made_of=b"t" * 32)
    trip.send(1, 2, ACTIVATION, tensor=torch.zeros(HEADER.shape))
    trip.send(2, 1, GRADIENT, made_of=trip.output_digest(2, ACTIVATION))
    trip.send(1, 0, GRADIENT)
    works, exposures = works_of(trip.show_all(), 3, 0, {})
    assert not exposures
    (guilty,) = [work for work in works if work.peer == trip.peer(1) and work.direction is ACTIVATION]
    assert guilty.source is not None
    assert torch.equal(guilty.source.tensor, clean[:1]) and not guilty.output.tensor.any()


@pytest.mark.parametrize("sequence", range(SEQUENCES))
def test_labels_that_a_stage_replaced_are_seen_by_its_own_receipts(sequence: int) -> None:
    trip = Trip()
    trip.send(1, 2, ACTIVATION, labels=memoryview(bytes(len(LABELS))))
    trip.send(2, 1, GRADIENT, made_of=trip.output_digest(2, ACTIVATION))
    trip.send(1, 0, GRADIENT)
    works, exposures = works_of({key: trip.show(*key, sequence) for key in trip.sent}, 3, sequence, {})
    assert not exposures and len(works) == 4
    assert [(work.peer, work.direction) for work in works if work.is_relabelled] == [
        (trip.peer(1), ACTIVATION)
    ]


def test_what_was_not_shown_is_not_judged() -> None:
    trip = Trip()
    shown = trip.show_all()
    del shown[1, ACTIVATION]
    works, exposures = works_of(shown, 3, 0, {})
    assert not exposures
    assert {(work.stage, work.direction) for work in works} == {(2, GRADIENT)}
