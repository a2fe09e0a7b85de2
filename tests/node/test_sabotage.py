"""A testbed's attacker sends what its attack says, receipted as its own; any other run refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.join import make_attack
from node.data import open_corpus
from node.flights import Held, Outgoing
from node.passes import Forwarded, StagePasses
from node.sabotage import Sabotage
from node.trainer import StageTrainer
from protocol.codec import decode_tensor, payload_digest, split_payload
from protocol.errors import UserError
from protocol.identity import Identity
from tests.swarms import in_process_swarm, small_manifest

CPU = torch.device("cpu")
MANIFEST = small_manifest(stages=3)


def stage_passes(stage: int, attack: str | None = None, *, start: int = 0) -> StagePasses:
    passes = StagePasses(MANIFEST, StageTrainer(MANIFEST, stage, CPU), CPU)
    config = make_attack(attack, "both", start, 1.0)
    if config is not None:
        passes.sabotage = Sabotage(config, stage, Identity.generate().peer_id, MANIFEST.seed)
        passes.trainer.memory = passes.sabotage.weight_memory
    return passes


def held(outgoing: Outgoing) -> Held:
    return Held(memoryview(bytearray(b"".join(outgoing.parts))))


def sent_tensors(attack: str | None, *, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and the gradient that stage 1 sends for slot 0."""
    head, middle, tail = stage_passes(0), stage_passes(1, attack, start=start), stage_passes(2)
    injected = head.inject(open_corpus(MANIFEST).draw(0), 0)
    assert isinstance(injected, Forwarded) and injected.output is not None
    forwarded = middle.forward(held(injected.output), 0)
    assert forwarded.output is not None
    answer = tail.tail(held(injected.output), 0, covered=True).answer
    assert answer is not None
    returned = middle.backward(forwarded.graph, held(answer), 0, covered=True).answer
    assert returned is not None
    header = middle.header
    for outgoing in (forwarded.output, returned):
        whole = memoryview(b"".join(outgoing.parts))
        assert outgoing.digest == payload_digest(header, *split_payload(header, whole))
    return (
        decode_tensor(forwarded.output.parts[0], header, CPU),
        decode_tensor(returned.parts[0], header, CPU),
    )


def test_both_directions_are_corrupted_before_they_are_signed() -> None:
    honest, flipped = sent_tensors(None), sent_tensors("flip")
    for one, other in zip(honest, flipped, strict=True):
        assert torch.equal(one, -other)


def test_it_is_honest_before_its_start() -> None:
    for one, other in zip(sent_tensors(None), sent_tensors("zeros", start=1), strict=True):
        assert torch.equal(one, other)


def test_what_is_withheld_is_not_sent() -> None:
    head, middle = stage_passes(0), stage_passes(1, "withhold:1")
    injected = head.inject(open_corpus(MANIFEST).draw(0), 0)
    assert isinstance(injected, Forwarded) and injected.output is not None
    assert middle.forward(held(injected.output), 0).output is None


def test_stale_work_is_honest_work_on_old_weights() -> None:
    head, middle = stage_passes(0), stage_passes(1, "stale:1", start=1)
    injected = head.inject(open_corpus(MANIFEST).draw(0), 0)
    assert isinstance(injected, Forwarded) and injected.output is not None
    sent = []
    for _ in range(2):
        forwarded = middle.forward(held(injected.output), 0)
        assert forwarded.output is not None
        sent.append(bytes(forwarded.output.parts[0]))
        middle.trainer.step(torch.ones(middle.trainer.size))
    assert sent[0] == sent[1]


async def test_a_run_that_is_no_testbed_refuses_attackers(tmp_path: Path) -> None:
    async with in_process_swarm(small_manifest(), tmp_path) as swarm:
        with pytest.raises(UserError, match="no testbed"):
            await swarm.join(1, attack=make_attack("zeros", "both", 0, 1.0))
