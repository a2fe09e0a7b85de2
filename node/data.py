"""Corpora: token samples as a deterministic function of (manifest, slot), which anyone can recompute."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from protocol.errors import UserError
from protocol.manifest import Manifest

Tokens = npt.NDArray[np.integer[Any]]

SPECS = "builtin:pydoc, text:GLOB or hf:DATASET[:CONFIG[:SPLIT]]"
# Builders of `datasets` that read plain files: for these, what follows is a path or glob and not a configuration.
_FILE_BUILDERS = ("text", "json", "csv", "parquet")
_RECENT_SLOTS = 1024
_ENCODED_AT_ONCE = 256


class Corpus(Protocol):
    """Where training samples come from."""

    def draw(self, slot: int) -> torch.Tensor:
        """The samples of a slot: int64 (sequences, context + 1). Inputs are [:, :-1], labels are [:, 1:]."""
        ...


class Tokenizer(Protocol):
    """Text to token ids below `size`. `separator` goes between documents."""

    size: int
    separator: int

    def encode(self, texts: list[str]) -> list[Tokens]: ...


class ByteTokenizer:
    """A token is a byte of UTF-8. The separator is NUL, which is in no text."""

    size = 256
    separator = 0

    def encode(self, texts: list[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]


class HuggingFaceTokenizer:
    """Any tokenizer of transformers, by hub name or by folder. Raises `UserError` if it cannot be loaded."""

    def __init__(self, name: str, cache_dir: Path | None) -> None:
        self._tokenizer = _load_tokenizer(name, cache_dir)
        self.size = len(self._tokenizer)
        end = self._tokenizer.eos_token_id
        self.separator: int = 0 if end is None else end

    def encode(self, texts: list[str]) -> list[Tokens]:
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(one, dtype=np.int32) for one in ids]


def _load_tokenizer(name: str, cache_dir: Path | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(name) / "tokenizer.json"
    try:
        if file.is_file() and not (Path(name) / "tokenizer_config.json").is_file():
            # What `tokenizers` itself saves: no configuration that AutoTokenizer could choose a class by.
            return PreTrainedTokenizerFast(tokenizer_file=str(file))
        return AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        remedy = "Use `bytes`, a folder with a tokenizer.json, or the name of a public tokenizer on the hub"
        raise UserError(f"Cannot load the tokenizer {name}: {_first_line(error)}", remedy) from None


def open_tokenizer(manifest: Manifest, cache_dir: Path | None = None) -> Tokenizer:
    """The manifest's tokenizer. Raises `UserError` if it cannot be loaded or does not fit the model's vocabulary."""
    name, vocabulary = manifest.model.tokenizer, manifest.model.vocabulary
    tokenizer: Tokenizer = ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name, cache_dir)
    if tokenizer.size > vocabulary:
        problem = (
            f"The tokenizer {name} has {tokenizer.size} entries but the model's vocab_size is {vocabulary}"
        )
        raise UserError(problem, f"Set vocab_size to {tokenizer.size} or more, or use a smaller tokenizer")
    return tokenizer


def open_corpus(manifest: Manifest, cache_dir: Path | None = None) -> Corpus:
    """The corpus that `manifest.data` names. Downloads go to `cache_dir`. Raises `UserError` if it cannot be had."""
    kind, source = parse_spec(manifest.data)
    tokenizer = open_tokenizer(manifest, cache_dir)
    if kind == "builtin":
        return MemoryCorpus(manifest, _tokenise(tokenizer, [_pydoc_text()]))
    if kind == "text":
        return MemoryCorpus(manifest, _tokenise(tokenizer, _read_texts(source)))
    return StreamCorpus(manifest, tokenizer, source, cache_dir)


def parse_spec(spec: str) -> tuple[str, str]:
    """A data spec's kind (`builtin`, `text` or `hf`) and what follows it. Raises `UserError` for any other."""
    kind, _, source = spec.partition(":")
    if spec == "builtin:pydoc" or (kind in ("text", "hf") and source):
        return kind, source
    raise UserError(f"Unknown data spec {spec}", f"Use {SPECS}")


class MemoryCorpus:
    """A text held in memory as tokens, 1 to 4 bytes each. Samples are windows drawn uniformly with replacement.

    Row r of a slot is a window at a place that is a hash of (seed, slot, r), so drawing keeps no state.
    """

    def __init__(self, manifest: Manifest, tokens: Tokens) -> None:
        self.tokens = tokens
        self._seed = manifest.seed
        self._sequences = manifest.batch.sequences
        self._length = manifest.batch.context + 1
        self._places = len(tokens) - self._length + 1
        if self._places < 1:
            problem = f"{manifest.data} has {len(tokens)} tokens but one sample takes {self._length}"
            raise UserError(problem, "Use more text or a smaller batch.context")

    def draw(self, slot: int) -> torch.Tensor:
        rows = [self._place(slot, row) for row in range(self._sequences)]
        windows = np.stack([self.tokens[at : at + self._length] for at in rows])
        return torch.from_numpy(windows.astype(np.int64))

    def _place(self, slot: int, row: int) -> int:
        key = b"sentinel/sample/1" + b"".join(
            value.to_bytes(8, "little") for value in (self._seed, slot, row)
        )
        # 128 bits: the modulo's bias is below 2^-80.
        return int.from_bytes(blake3(key).digest(length=16), "little") % self._places


class StreamCorpus:
    """A Hugging Face data set read as a stream: documents in a row, cut into consecutive windows, again from the start
    when it ends.

    Slot n is the stream's n-th group of windows. Reading forward is cheap, the latest groups are kept, and an earlier
    one costs reading the stream again from its start.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, source: str, cache_dir: Path | None) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._dataset = _open_stream(source, cache_dir)
        self._rows = manifest.batch.sequences
        self._length = manifest.batch.context + 1
        self._recent: OrderedDict[int, Tokens] = OrderedDict()
        self._restart()
        self.draw(0)  # What cannot be read should fail here, and not in the midst of a run.

    def draw(self, slot: int) -> torch.Tensor:
        if slot not in self._recent and slot < self._next_slot:
            self._restart()
        while slot >= self._next_slot:
            self._recent[self._next_slot] = next(self._groups)
            self._next_slot += 1
            if len(self._recent) > _RECENT_SLOTS:
                self._recent.popitem(last=False)
        return torch.from_numpy(self._recent[slot].astype(np.int64))

    def _restart(self) -> None:
        self._recent.clear()
        self._groups = self._read_groups()
        self._next_slot = 0

    def _read_groups(self) -> Iterator[Tokens]:
        size = self._rows * self._length
        pieces: list[Tokens] = []
        held = 0
        while True:
            in_this_pass = 0
            for document in _documents(self._dataset, self._source):
                piece = _with_separator(self._tokenizer, document)
                pieces.append(piece)
                held += len(piece)
                in_this_pass += len(piece) - 1
                if held >= size:
                    joined = np.concatenate(pieces)
                    whole = held - held % size
                    # A copy, so that a kept group does not keep its long document alive.
                    yield from (
                        joined[at : at + size].reshape(self._rows, -1).copy() for at in range(0, whole, size)
                    )
                    pieces, held = [joined[whole:]], held - whole
            if not in_this_pass:
                raise UserError(
                    f"The data set {self._source} holds no text", "Name another data set or split"
                )


def _open_stream(source: str, cache_dir: Path | None) -> Any:
    """`DATASET[:CONFIG[:SPLIT]]`, or `BUILDER:FILES` for the builders that read plain files."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "hf: data needs the `datasets` package", "pip install 'sentinel-node[data]'"
        ) from None
    name, _, rest = source.partition(":")
    options: dict[str, Any] = {"split": "train", "streaming": True}
    if cache_dir is not None:
        options["cache_dir"] = str(cache_dir)
    if name in _FILE_BUILDERS and rest:
        options["data_files"] = rest
    else:
        configuration, _, split = rest.partition(":")
        options["name"] = configuration or None
        options["split"] = split or "train"
    try:
        return load_dataset(name, **options)
    except Exception as error:  # noqa: BLE001 - `datasets` raises what any of a dozen file systems raises
        raise UserError(
            f"Cannot open the data set {source}: {_first_line(error)}", _stream_remedy()
        ) from None


def _documents(dataset: Any, source: str) -> Iterator[str]:
    """The `text` column of one pass over a data set."""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - as above
            raise UserError(
                f"Cannot read the data set {source}: {_first_line(error)}", _stream_remedy()
            ) from None
        if not isinstance(row.get("text"), str):
            problem = f"The data set {source} has no `text` column, only {', '.join(map(str, row))}"
            raise UserError(problem, "Name a data set or configuration with a column `text`")
        yield row["text"]


def _stream_remedy() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set: unset it, or use builtin:pydoc or text:GLOB"
    return "Check the name and the network, or use builtin:pydoc or text:GLOB"


def _pydoc_text() -> str:
    """About half a megabyte of English prose that every Python brings along."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _read_texts(pattern: str) -> list[str]:
    """The UTF-8 files that a glob matches, in order of their paths."""
    expanded = Path(pattern).expanduser()
    relative = str(expanded.relative_to(expanded.anchor))
    try:
        paths = sorted(path for path in Path(expanded.anchor).glob(relative) if path.is_file())
    except (ValueError, OSError) as error:
        raise UserError(
            f"text:{pattern} is no valid glob: {_first_line(error)}", "Write, say, text:books/*.txt"
        ) from None
    if not paths:
        raise UserError(f"text:{pattern} matches no file", "Check the path; quote the glob in a shell")
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        problem = f"Cannot read what text:{pattern} matches: {_first_line(error)}"
        raise UserError(problem, "Make every file that matches a readable UTF-8 text") from None


def _with_separator(tokenizer: Tokenizer, text: str) -> Tokens:
    (tokens,) = tokenizer.encode([text])
    joined: Tokens = np.append(tokens, np.asarray([tokenizer.separator], dtype=tokens.dtype))
    return joined


def _tokenise(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """All texts in a row with separators between, in the smallest dtype that holds the vocabulary."""
    largest = tokenizer.size - 1
    dtype = np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.int32
    separator: Tokens = np.asarray([tokenizer.separator], dtype=dtype)
    pieces: list[Tokens] = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        for tokens in tokenizer.encode(texts[start : start + _ENCODED_AT_ONCE]):
            compact: Tokens = tokens.astype(dtype, copy=False)
            pieces += [compact, separator]
    return np.concatenate(pieces[:-1])


def unigram_entropy(corpus: Corpus) -> float:
    """Nats per token of a model that knows only how frequent tokens are: what a language model must beat.

    Raises `UserError` for a corpus that is not held in memory.
    """
    if not isinstance(corpus, MemoryCorpus):
        raise UserError("A streamed data set has no known unigram entropy", "Use builtin:pydoc or text:GLOB")
    _, counts = np.unique(corpus.tokens, return_counts=True)
    frequencies = counts / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
