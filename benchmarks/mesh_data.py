"""The mesh's text: training samples from the front of the corpus, validation samples from its held-out end."""

from __future__ import annotations

import torch
from torch import Tensor

from node.data import Corpus, MemoryCorpus, open_corpus
from protocol.manifest import Manifest

_HELD_OUT = 0.1
_VALIDATION_SEQUENCES = 64
# A streamed corpus cannot be split by place: its validation samples are its first slots, and training starts behind.
_STREAM_OFFSET = 64


class MeshData:
    """Training microbatches by number, and one fixed validation batch."""

    def __init__(self, manifest: Manifest) -> None:
        corpus = open_corpus(manifest)
        needed = -(-_VALIDATION_SEQUENCES // manifest.batch.sequences)
        held_out: Corpus = corpus
        self._offset = _STREAM_OFFSET
        if isinstance(corpus, MemoryCorpus):
            cut = int(len(corpus.tokens) * (1 - _HELD_OUT))
            held_out = MemoryCorpus(manifest, corpus.tokens[cut:])
            corpus = MemoryCorpus(manifest, corpus.tokens[:cut])
            self._offset = 0
        self._corpus = corpus
        self.validation: Tensor = torch.cat([held_out.draw(slot) for slot in range(needed)])

    def draw(self, first: int, count: int) -> Tensor:
        """Microbatches `first`.. : int64 tokens (count x B, T + 1), inputs and labels overlapping."""
        return torch.cat([self._corpus.draw(self._offset + first + index) for index in range(count)])
