"""The inline guard: what a receiver asks of every tensor before it uses it. It sees single tensors, not their inputs.

The paper's check on the statistics of `verifier.features`, on the tokens at a few places that the receiver draws by
itself and tells nobody: a corruption of the whole tensor shows there as well as anywhere, and looking at every element
of every tensor would cost more than the check is worth. In numpy, where an operation on so few numbers costs a fraction
of what it costs in torch.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from torch import Tensor

from verifier import features
from verifier.baseline import Centring, MeanTensor
from verifier.streams import Direction, Floats, Peer

_ELEMENTS = 4096
_FEWEST_PLACES = 4
_LATEST = 24
# While it is young it learns from every tensor, then from every second: learning costs as much as looking.
_YOUNG = 64


class Guard:
    """Of one receiver and one direction. `check` every tensor that arrives; what passes, it learns from.

    `limit` is in robust standard deviations (`Settings.guard`). What is flagged is not learned from; but if more than
    half of the peers that sent the latest tensors are flagged, then it is the stream that has changed, and the
    baseline starts anew: a receiver that refuses everybody would end the run.
    """

    def __init__(self, direction: Direction, generator: np.random.Generator, limit: float = 6.0) -> None:
        self._generator, self._limit = generator, limit
        self._mean = MeanTensor({Direction.ACTIVATION: 0.9, Direction.GRADIENT: 0.8}[direction] ** (1 / 8))
        self._centring = Centring(len(features.MARGINAL))
        self._latest: deque[tuple[Peer, bool]] = deque(maxlen=_LATEST)
        self._places: torch.Tensor | None = None
        self.checked = self.flagged = 0

    def check(self, tensor: Tensor, sender: Peer) -> bool:
        """Whether a tensor (B, T, W) of any floating dtype, on any device, may be used."""
        seen = self._look(tensor)
        distances = self._distances(seen)
        values = features.log_marginal(distances[None])
        is_odd = not np.isfinite(values).all()
        if not is_odd:
            residuals = self._centring.residuals(values, 0, None)
            is_odd = math.sqrt(float(np.square(residuals).mean())) > self._limit
            if not is_odd and (self.checked < _YOUNG or self.checked % 2):
                self._mean.update(torch.from_numpy(seen.mean(0))[None])
                self._centring.learn(values, residuals)
        self._note(sender, is_odd)
        return not is_odd

    def _look(self, tensor: Tensor) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
        """(B, P, W) the tokens at our places."""
        sequences, tokens, width = tensor.shape
        if self._places is None:
            count = min(tokens, max(_FEWEST_PLACES, _ELEMENTS // (sequences * width)))
            drawn = self._generator.choice(tokens, count, replace=False)
            self._places = torch.from_numpy(np.sort(drawn))
        seen: np.ndarray[tuple[int, int, int], np.dtype[np.float32]] = (
            tensor.detach().index_select(1, self._places.to(tensor.device)).to("cpu", torch.float32).numpy()
        )
        return seen

    def _distances(self, seen: np.ndarray[tuple[int, int, int], np.dtype[np.float32]]) -> Floats:
        """(4,) as `features.marginal_distances`."""
        mean = seen.mean(0) if self._mean.value is None else self._mean.value.numpy()
        away = seen - mean
        size = float(np.sqrt(np.square(mean).mean())) + 1e-20
        flips = (1 - float(np.sign(seen * mean).mean())) / 2
        directions = features.projections(seen.shape[-1]).numpy()
        own = np.sort((seen.reshape(-1, seen.shape[-1]) @ directions).T, axis=1)
        usual = np.sort((mean @ directions).T, axis=1).repeat(len(seen), axis=1)
        return np.array(
            [
                float(np.abs(away).mean()),
                float(np.sqrt(np.square(away).mean())) / size,
                flips,
                float(np.abs(own - usual).mean()),
            ]
        )

    def _note(self, sender: Peer, is_odd: bool) -> None:
        self.checked += 1
        self.flagged += is_odd
        self._latest.append((sender, is_odd))
        if not is_odd or len(self._latest) < _LATEST:
            return
        peers = {peer for peer, _ in self._latest}
        # Of a peer: most of what it sent.
        odd = {
            peer
            for peer in peers
            if 2 * sum(was for one, was in self._latest if one == peer)
            > sum(one == peer for one, _ in self._latest)
        }
        if 2 * len(odd) > len(peers):
            self._latest.clear()
            self._centring.restart()
