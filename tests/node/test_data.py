"""Corpora: samples are a function of manifest and slot, and what cannot be read is one clear line."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from node.data import MemoryCorpus, open_corpus, unigram_entropy
from protocol.errors import UserError
from protocol.manifest import (
    BatchSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    StagesSection,
)


def make_manifest(data: str, *, tokenizer: str = "bytes", vocabulary: int = 256, seed: int = 1) -> Manifest:
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": vocabulary}
    return Manifest(
        name="test",
        seed=seed,
        data=data,
        model=ModelSection(config=config, tokenizer=tokenizer),
        stages=StagesSection(cut=(0, 1)),
        batch=BatchSection(context=16, sequences=3, microbatches=2),
        optimizer=OptimizerSection(lr=1e-3),
        schedule=ScheduleSection(rounds=3),
    )


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("the second book, of no great length but longer than a sample. " * 20)
    (tmp_path / "a.txt").write_text("the first book, which is also about nothing in particular. " * 20)
    return tmp_path


@pytest.fixture
def bpe(books: Path) -> Path:
    """A byte-level BPE of 300 entries as `tokenizers` saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(books / "a.txt"), str(books / "b.txt")], trainer)
    folder = books / "bpe"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_slot_is_the_same_for_everyone_and_differs_from_others() -> None:
    manifest = make_manifest("builtin:pydoc")
    mine, theirs = open_corpus(manifest), open_corpus(manifest)
    sample = mine.draw(7)
    assert sample.shape == (3, 17) and sample.dtype == torch.int64
    mine.draw(3)
    assert torch.equal(mine.draw(7), sample) and torch.equal(theirs.draw(7), sample)
    assert not torch.equal(mine.draw(8), sample)
    assert not torch.equal(open_corpus(make_manifest("builtin:pydoc", seed=2)).draw(7), sample)


def test_samples_are_windows_of_the_text(books: Path) -> None:
    corpus = open_corpus(make_manifest(f"text:{books}/*.txt"))
    text = (books / "a.txt").read_bytes() + b"\x00" + (books / "b.txt").read_bytes()
    for slot in range(20):
        for row in corpus.draw(slot):
            assert bytes(row.tolist()) in text


def test_every_place_is_drawn_including_the_ends() -> None:
    manifest = make_manifest("builtin:pydoc")
    corpus = MemoryCorpus(manifest, np.arange(20, dtype=np.uint8))
    starts = [int(row[0]) for slot in range(200) for row in corpus.draw(slot)]
    counts = np.bincount(starts, minlength=4)
    assert len(counts) == 4 and counts.min() > 100


def test_tokens_are_held_compactly(books: Path, bpe: Path) -> None:
    by_bytes = open_corpus(make_manifest(f"text:{books}/*.txt"))
    by_words = open_corpus(make_manifest(f"text:{books}/*.txt", tokenizer=str(bpe), vocabulary=512))
    assert isinstance(by_bytes, MemoryCorpus) and by_bytes.tokens.dtype == np.uint8
    assert isinstance(by_words, MemoryCorpus) and by_words.tokens.dtype == np.uint16
    assert len(by_words.tokens) < len(by_bytes.tokens) and by_words.tokens.max() < 300


def test_unigram_entropy_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("aabc" * 100)
    corpus = open_corpus(make_manifest(f"text:{tmp_path}/x"))
    assert unigram_entropy(corpus) == pytest.approx(1.5 * math.log(2))


def test_a_stream_is_consecutive_windows_and_can_go_back_and_round(books: Path) -> None:
    manifest = make_manifest(f"hf:text:{books}/*.txt")
    corpus = open_corpus(manifest, books / "cache")
    forward = [corpus.draw(slot) for slot in range(60)]
    # Each text is one line here, and the separator ends it.
    text = b"".join((books / name).read_text().strip().encode() + b"\x00" for name in ("a.txt", "b.txt"))
    drawn = b"".join(bytes(sample.flatten().tolist()) for sample in forward)
    stream = b"".join(bytes(part) for part in (text.replace(b"\x00", b" \x00"),))
    assert drawn.startswith((text[:500], stream[:500]))
    assert len(drawn) > len(text), "the stream starts again at its end"
    corpus.draw(1500)
    assert torch.equal(corpus.draw(2), forward[2]), "an earlier slot is read again"
    assert torch.equal(open_corpus(manifest, books / "cache").draw(59), forward[59]), "slots may be skipped"
    with pytest.raises(UserError, match="no known unigram entropy"):
        unigram_entropy(corpus)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("text:/nowhere/*.txt", "matches no file"),
        ("text:", "Unknown data spec"),
        ("builtin:bible", "Unknown data spec"),
        ("c4", "Unknown data spec"),
        ("hf:/nowhere/at/all", "Cannot open the data set"),
    ],
)
def test_a_corpus_that_cannot_be_had_is_a_user_error(
    data: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=says):
        open_corpus(make_manifest(data), tmp_path)


def test_too_short_or_unreadable_text_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("0123456789abcdef")
    with pytest.raises(UserError, match="16 tokens but one sample takes 17"):
        open_corpus(make_manifest(f"text:{tmp_path}/short"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(UserError, match="Cannot read"):
        open_corpus(make_manifest(f"text:{tmp_path}/binary"))


def test_a_data_set_without_text_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"body": "no such column"}\n')
    with pytest.raises(UserError, match="no `text` column, only body"):
        open_corpus(make_manifest(f"hf:json:{tmp_path}/x.json"), tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        open_corpus(make_manifest(f"hf:text:{tmp_path}/empty.txt"), tmp_path)


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sentinel-node\[data\]'"):
        open_corpus(make_manifest("hf:anything"))


def test_a_tokenizer_must_load_and_fit_the_model(bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot load the tokenizer"):
        open_corpus(make_manifest("builtin:pydoc", tokenizer=str(tmp_path / "none")))
    with pytest.raises(UserError, match="vocab_size to 300"):
        open_corpus(make_manifest("builtin:pydoc", tokenizer=str(bpe)))
    with pytest.raises(UserError, match="256 entries but the model's vocab_size is 100"):
        open_corpus(make_manifest("builtin:pydoc", vocabulary=100))
