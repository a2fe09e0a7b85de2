"""What the compute thread promises to the event loop that watches it."""

from __future__ import annotations

import pytest
import torch

from node.data import open_corpus
from node.flights import Held
from node.passes import Forwarded, Returned, StagePasses
from node.trainer import StageTrainer
from protocol.codec import Payload, TensorHeader, digest, leaves_of, split_payload
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity
from protocol.receipts import Direction, MicrobatchId, Receipt, SignedReceipt
from tests.swarms import small_manifest

CPU = torch.device("cpu")


@pytest.fixture
def chain() -> list[StagePasses]:
    manifest = small_manifest(stages=2)
    return [StagePasses(manifest, StageTrainer(manifest, stage, CPU), CPU) for stage in range(2)]


def held_of(header: TensorHeader, payload: memoryview) -> Held:
    """As if it had just come, without a receipt."""
    leaves = leaves_of(header, *split_payload(header, payload))
    return Held(payload, None, digest(*leaves), leaves)


def received(chain: list[StagePasses], forwarded: Forwarded) -> Held:
    assert forwarded.output is not None
    return held_of(chain[1].header, memoryview(bytearray(b"".join(forwarded.output.parts))))


def inject(chain: list[StagePasses], slot: int) -> Forwarded:
    tokens = open_corpus(small_manifest(stages=2)).draw(slot)
    forwarded = chain[0].inject(tokens, slot)
    assert isinstance(forwarded, Forwarded)
    return forwarded


def test_slots_are_never_missing_while_they_are_taken(chain: list[StagePasses]) -> None:
    chain[1].tail(received(chain, inject(chain, 0)), 0, covered=False)
    seen: list[tuple[tuple[int, ...], list[int]]] = []
    chain[1].take_gradient(lambda gradient, slots: seen.append((slots, list(chain[1].slots))))
    assert seen == [((0,), [0])], "a head that looks now would inject slot 0 again"
    assert chain[1].slots == []


def test_a_covered_slot_is_computed_but_not_accumulated(chain: list[StagePasses]) -> None:
    forwarded = inject(chain, 0)
    returned = chain[1].tail(received(chain, forwarded), 0, covered=True)
    assert returned.answer is not None
    payload = memoryview(bytearray(returned.answer.parts[0]))
    back = chain[0].backward(forwarded.graph, held_of(chain[0].header, payload), 0, covered=True)
    assert isinstance(back, Returned)
    assert chain[0].slots == chain[1].slots == []


@pytest.mark.parametrize("sequence", [0, 1])
def test_a_heads_activation_done_again_has_its_labels(chain: list[StagePasses], sequence: int) -> None:
    tokens = open_corpus(small_manifest(stages=2)).draw(3)
    output = inject(chain, 3).output
    assert output is not None
    tensor, labels = (bytes(part) for part in output.parts)
    made = bytes(chain[0].redo(Direction.ACTIVATION, 0, memoryview(b""), tokens, sequence))
    size, own = len(tensor) // len(tokens), len(labels) // len(tokens)
    assert made[:size] == tensor[sequence * size : (sequence + 1) * size]
    assert made[size:] == labels[sequence * own : (sequence + 1) * own]


def sworn(held: Held, sender: Identity, slot: int, attempt: int = 0, made_of: bytes = b"i" * 32) -> Held:
    """The same payload with its sender's receipt."""
    receipt = Receipt(
        b"r" * 32, MicrobatchId(sender.peer_id, slot, attempt), Direction.ACTIVATION, 0, 0, made_of,
        held.digest, sender.peer_id, sender.peer_id,
    )  # fmt: skip
    return Held.of(Payload(held.payload, held.leaves), SignedReceipt.sign(receipt, sender))


class _PassesAll:
    def check(self, tensor: torch.Tensor, sender: str, labels: object, *, version: int) -> bool:
        return True


def test_a_tensor_that_came_before_is_flagged_though_labels_and_receipt_are_new(
    chain: list[StagePasses],
) -> None:
    tail, sender = chain[1], Identity.generate()
    tail.guards = {Direction.ACTIVATION: _PassesAll()}  # type: ignore[dict-item]
    first, second = received(chain, inject(chain, 0)), received(chain, inject(chain, 1))
    size = tail.header.size
    mixed = memoryview(bytearray(bytes(first.payload[:size]) + bytes(second.payload[size:])))
    again = held_of(tail.header, mixed)
    assert tail.tail(sworn(first, sender, 0), 0, covered=True).loss is not None
    assert tail.tail(sworn(second, sender, 1, made_of=b"j" * 32), 1, covered=True).loss is not None
    with pytest.raises(ProtocolError, match="flagged"):
        tail.tail(sworn(again, sender, 2, made_of=b"k" * 32), 2, covered=True)


class _FlagsAll:
    def __init__(self, only: str | None = None) -> None:
        self._only = only
        self.checked = 0

    def check(self, tensor: torch.Tensor, sender: str, labels: object, *, version: int) -> bool:
        self.checked += 1
        return False

    def hears_only(self, sender: str) -> bool:
        return sender == self._only


def test_a_text_that_is_odd_by_itself_is_not_lost_for_ever(chain: list[StagePasses]) -> None:
    """Flagged from one sender; from a second one, or at a late attempt, it is used: else the run would end with it."""
    tail, plain, guard = chain[1], received(chain, inject(chain, 0)), _FlagsAll()
    tail.guards = {Direction.ACTIVATION: guard}  # type: ignore[dict-item]

    def sent_by(sender: Identity, slot: int = 0, attempt: int = 0) -> Held:
        return sworn(plain, sender, slot, attempt)

    one, other = Identity.generate(), Identity.generate()
    for attempt in range(2):
        with pytest.raises(ProtocolError, match="flagged"):
            tail.tail(sent_by(one, attempt=attempt), 0, covered=True)
    assert guard.checked == 1, "what comes again is no new evidence"
    assert tail.tail(sent_by(other), 0, covered=True).loss is not None
    assert tail.tail(sent_by(one, slot=5, attempt=6), 5, covered=True).loss is not None
    with pytest.raises(ProtocolError, match="flagged"):
        tail.tail(sent_by(other, slot=9), 9, covered=True)


def test_an_odd_text_of_the_only_sender_is_used_when_it_comes_again(chain: list[StagePasses]) -> None:
    """Nobody else could bring it: to refuse it again and again would only hold up the round."""
    tail, plain, one = chain[1], received(chain, inject(chain, 0)), Identity.generate()
    tail.guards = {Direction.ACTIVATION: _FlagsAll(only=one.peer_id)}  # type: ignore[dict-item]
    for slot in range(2):
        with pytest.raises(ProtocolError, match="flagged"):
            tail.tail(sworn(plain, one, slot), slot, covered=True)
        assert tail.tail(sworn(plain, one, slot, attempt=1), slot, covered=True).loss is not None


@pytest.mark.parametrize("reason", [Reason.NOT_FINITE, Reason.MALFORMED])
def test_bad_payloads_are_refused(chain: list[StagePasses], reason: Reason) -> None:
    held = received(chain, inject(chain, 0))
    if reason is Reason.NOT_FINITE:
        held.payload[:4] = b"\x00\x00\xc0\x7f"  # NaN, little-endian
    else:
        held.payload[-4:] = b"\xff\xff\xff\x7f"  # a label outside the vocabulary
    with pytest.raises(ProtocolError) as caught:
        chain[1].tail(held, 0, covered=False)
    assert caught.value.reason is reason
    assert chain[1].slots == []
