"""The stage trainer: chained stages train like one process, old graphs survive steps, state moves bit by bit."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from node.data import open_corpus
from node.model import build_uncut
from node.reference import train_uncut
from node.trainer import Pass, StageTrainer, chunk_digest, flat_norm, learning_rate, state_digest
from protocol.manifest import (
    BatchSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    StagesSection,
)

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


def make_manifest(cut: tuple[int, ...] = (0, 1, 3, 4), clip: float = 0.5) -> Manifest:
    return Manifest(
        name="test",
        seed=1,
        data="builtin:pydoc",
        model=ModelSection(config=CONFIG),
        stages=StagesSection(cut=cut),
        batch=BatchSection(context=16, sequences=2, microbatches=3),
        optimizer=OptimizerSection(lr=1e-2, warmup_rounds=2, clip=clip),
        schedule=ScheduleSection(rounds=6),
    )


def make_chain(manifest: Manifest) -> list[StageTrainer]:
    return [StageTrainer(manifest, stage, CPU) for stage in range(manifest.stages.count)]


def run_microbatch(chain: list[StageTrainer], samples: Tensor) -> float:
    passes: list[Pass] = []
    hidden = samples[:, :-1]
    for trainer in chain[:-1]:
        passes.append(trainer.forward(hidden))
        hidden = passes[-1].output
    loss, gradient = chain[-1].loss_backward(hidden, samples[:, 1:], accumulate=True)
    for trainer, taken in zip(chain[-2::-1], passes[::-1], strict=True):
        assert gradient is not None
        gradient = trainer.backward(taken, gradient, accumulate=True)
    assert gradient is None
    return loss


@pytest.fixture
def middle() -> StageTrainer:
    return StageTrainer(make_manifest(), 1, CPU)


def hidden(seed: int) -> Tensor:
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(seed))


def test_chained_trainers_train_like_the_uncut_model() -> None:
    manifest = make_manifest()
    corpus, chain = open_corpus(manifest), make_chain(manifest)
    losses = []
    for round_ in range(5):
        losses.append(sum(run_microbatch(chain, corpus.draw(round_ * 3 + index)) for index in range(3)) / 3)
        for trainer in chain:
            gradient, count = trainer.take_gradient()
            assert count == 3
            trainer.step(gradient / count)
    assert losses == pytest.approx(train_uncut(manifest, 5), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_a_stage_that_is_first_and_last_trains_like_the_uncut_model() -> None:
    manifest = make_manifest(cut=(0, 4), clip=0)
    corpus, (trainer,) = open_corpus(manifest), make_chain(manifest)
    losses = []
    for round_ in range(3):
        losses.append(
            sum(run_microbatch([trainer], corpus.draw(round_ * 3 + index)) for index in range(3)) / 3
        )
        trainer.step(trainer.take_gradient()[0] / 3)
    assert losses == pytest.approx(train_uncut(manifest, 3), rel=1e-5)


def test_gradients_add_up_over_microbatches(middle: StageTrainer) -> None:
    for seed in (1, 2):
        middle.backward(middle.forward(hidden(seed)), hidden(9), accumulate=True)
    both, count = middle.take_gradient()
    assert count == 2 and both.dtype == torch.float32 and both.shape == (middle.size,)
    singles = []
    for seed in (1, 2):
        middle.backward(middle.forward(hidden(seed)), hidden(9), accumulate=True)
        singles.append(middle.take_gradient()[0])
    assert torch.allclose(both, singles[0] + singles[1], atol=1e-6)
    empty, none = middle.take_gradient()
    assert none == 0 and not empty.any()


def test_without_accumulation_only_the_input_gets_a_gradient(middle: StageTrainer) -> None:
    with_weights = middle.backward(middle.forward(hidden(1)), hidden(2), accumulate=True)
    middle.take_gradient()
    alone = middle.backward(middle.forward(hidden(1)), hidden(2), accumulate=False)
    assert with_weights is not None and alone is not None and torch.equal(alone, with_weights)
    assert middle.accumulated == 0 and not middle.take_gradient()[0].any()
    first = StageTrainer(make_manifest(), 0, CPU)
    taken = first.forward(torch.zeros(2, 16, dtype=torch.int64))
    assert first.backward(taken, hidden(2), accumulate=False) is None


def test_a_graph_made_before_a_step_keeps_its_weights(middle: StageTrainer) -> None:
    expected_input = middle.backward(middle.forward(hidden(1)), hidden(2), accumulate=True)
    expected = middle.take_gradient()[0]
    early, late = middle.forward(hidden(1)), middle.forward(hidden(1))
    old_output = early.output.clone()
    for trainer_round in range(3):
        middle.step(torch.randn(middle.size, generator=torch.Generator().manual_seed(trainer_round)))
    assert middle.version == 3 and early.version == 0
    assert not torch.allclose(middle.forward(hidden(1)).output, old_output, atol=1e-3)
    got_input = middle.backward(early, hidden(2), accumulate=True)
    assert got_input is not None and expected_input is not None and torch.equal(got_input, expected_input)
    assert torch.equal(middle.take_gradient()[0], expected), "it lands in the accumulator of now"
    middle.backward(late, hidden(2), accumulate=True)
    assert torch.equal(middle.take_gradient()[0], expected), "taking the gradient does not wait for graphs"


def test_a_step_without_live_graphs_allocates_no_new_weights(middle: StageTrainer) -> None:
    def place() -> int:
        return next(middle.module.parameters()).data_ptr()

    before = place()
    middle.forward(hidden(1)).release()
    middle.backward(middle.forward(hidden(1)), hidden(2), accumulate=True)
    middle.step(torch.ones(middle.size))
    assert place() == before
    alive = middle.forward(hidden(1))
    middle.step(torch.ones(middle.size))
    assert place() != before
    alive.release()
    with pytest.raises(ValueError, match="released"):
        middle.backward(alive, hidden(2), accumulate=True)


def test_equal_gradients_give_bit_identical_weights_whatever_the_threads() -> None:
    threads = torch.get_num_threads()
    digests = set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            trainer = StageTrainer(make_manifest(), 2, CPU)
            for round_ in range(3):
                trainer.step(torch.randn(trainer.size, generator=torch.Generator().manual_seed(round_)))
            digests.add(trainer.digest(1 << 12))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(middle: StageTrainer, bad: float) -> None:
    before = middle.digest(1 << 12)
    gradient = torch.ones(middle.size)
    gradient[5] = bad
    with pytest.raises(ValueError, match="not finite"):
        middle.step(gradient)
    with pytest.raises(ValueError, match="flat fp32 vector"):
        middle.step(torch.ones(middle.size + 1))
    with pytest.raises(ValueError, match="flat fp32 vector"):
        middle.step(torch.ones(middle.size, dtype=torch.float64))
    assert middle.digest(1 << 12) == before and middle.version == 0


def test_a_loss_that_is_not_finite_is_not_accumulated() -> None:
    last = StageTrainer(make_manifest(), 2, CPU)
    with pytest.raises(ValueError, match="loss is not finite"):
        last.loss_backward(hidden(1) * math.nan, torch.zeros(2, 16, dtype=torch.int64), accumulate=True)
    assert last.accumulated == 0


def test_the_gradient_is_clipped_to_the_stages_share() -> None:
    """AdamW's first step does not see the gradient's size, so look at the first moment."""
    manifest = make_manifest(clip=0.5)
    trainer = StageTrainer(manifest, 1, CPU)
    trainer.step(torch.ones(trainer.size))
    moment = torch.frombuffer(bytearray(b"".join(trainer.state_chunks(1 << 30)[2:3])), dtype=torch.float32)
    assert moment.norm().item() == pytest.approx(0.1 * 0.5 / math.sqrt(3), rel=1e-4)


def test_skipping_a_round_changes_only_the_version(middle: StageTrainer) -> None:
    before, digest = middle.state_chunks(1 << 30)[1:], middle.digest(1 << 12)
    middle.skip()
    assert middle.version == 1 and middle.state_chunks(1 << 30)[1:] == before
    assert middle.digest(1 << 12) != digest


def test_learning_rate_rises_then_falls_to_its_last_fraction() -> None:
    section = OptimizerSection(lr=1.0, warmup_rounds=4, final_lr_fraction=0.1)
    rates = [learning_rate(section, 20, version) for version in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.55) and rates[20:] == pytest.approx([0.1] * 5)


def test_flat_norm_is_exact_enough_and_sees_what_is_not_finite() -> None:
    flat = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    assert flat_norm(flat) == pytest.approx(flat.double().norm().item(), rel=1e-12)
    flat[10_000] = math.inf
    assert flat_norm(flat) == math.inf


def trained(stage: int = 1) -> StageTrainer:
    trainer = StageTrainer(make_manifest(), stage, CPU)
    for round_ in range(2):
        trainer.step(torch.randn(trainer.size, generator=torch.Generator().manual_seed(round_)))
    trainer.skip()
    return trainer


@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 1 << 30])
def test_state_moves_and_training_goes_on_bit_by_bit(middle: StageTrainer, chunk_bytes: int) -> None:
    source = trained()
    chunks = [bytes(chunk) for chunk in source.state_chunks(chunk_bytes)]
    assert max(map(len, chunks)) <= chunk_bytes and sum(map(len, chunks)) == source.state_bytes()
    middle.load_state(3, chunks)
    assert middle.version == 3 and middle.digest(4096) == source.digest(4096)
    assert torch.equal(middle.forward(hidden(1)).output, source.forward(hidden(1)).output)
    for trainer in (middle, source):
        trainer.step(torch.ones(trainer.size))
    assert middle.digest(4096) == source.digest(4096)


def test_earlier_weights_are_kept_by_number_and_by_age(
    middle: StageTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 1.0, 2.0, 3.0, 12.5, 30.0, 31.0))
    monkeypatch.setattr("node.trainer.monotonic", lambda: next(clock))
    middle.memory, middle.memory_seconds = 3, 10.0
    kept = []
    for _ in range(7):
        middle.step(torch.ones(middle.size))
        kept.append(middle.version - middle.oldest)
    assert kept == [1, 2, 3, 3, 2, 1, 2]
    middle.redo(middle.oldest, hidden(1))
    with pytest.raises(ValueError, match="not kept"):
        middle.redo(middle.oldest - 1, hidden(1))


def test_a_gradient_is_made_again_where_none_are_recorded(middle: StageTrainer) -> None:
    """Attacks are carried out so, and one of them sends what older weights would have made."""
    x, gradient = hidden(1), hidden(2)
    expected = middle.redo(0, x, gradient)
    with torch.no_grad():
        assert torch.equal(middle.redo(0, x, gradient), expected)
        assert torch.equal(middle.redo(0, x), middle.forward(x).output)


def test_chunks_can_be_checked_one_by_one() -> None:
    source = trained()
    digests = source.chunk_digests(1000)
    assert digests == [chunk_digest(chunk) for chunk in source.state_chunks(1000)]
    assert source.digest(1000) == state_digest(digests) == blake3(b"".join(digests)).digest()


def test_exported_state_is_a_snapshot() -> None:
    source = trained()
    chunks = source.state_chunks(4096)
    before = [bytes(chunk) for chunk in chunks]
    source.step(torch.ones(source.size))
    assert [bytes(chunk) for chunk in chunks] == before


def test_loading_keeps_graphs_in_flight_valid(middle: StageTrainer) -> None:
    expected = middle.backward(middle.forward(hidden(1)), hidden(2), accumulate=False)
    taken = middle.forward(hidden(1))
    middle.load_state(3, trained().state_chunks(4096))
    got = middle.backward(taken, hidden(2), accumulate=True)
    assert expected is not None and got is not None and torch.equal(got, expected)


def test_an_impossible_state_is_refused_and_changes_nothing(middle: StageTrainer) -> None:
    chunks = [bytes(chunk) for chunk in trained().state_chunks(4096)]
    nan = bytes.fromhex("0000c07f")
    wrong = {
        "longer": [*chunks, b"x"],
        "bytes, not": chunks[:-1],
        "of version 3": chunks,
        "impossible": [*chunks[:-1], chunks[-1][:-4] + nan],
    }
    before = middle.digest(4096)
    for says, given in wrong.items():
        with pytest.raises(ValueError, match=says):
            middle.load_state(2 if says == "of version 3" else 3, given)
    assert middle.digest(4096) == before and middle.version == 0


def test_initial_weights_are_those_of_the_uncut_model() -> None:
    manifest = make_manifest()
    uncut = build_uncut(manifest, CPU)
    total = sum(parameter.numel() for parameter in uncut.parameters())
    assert sum(trainer.size for trainer in make_chain(manifest)) == total
