"""What is measured on a tensor: its distances to the stream, and how it follows from its input.

Everything is one pass over (N, B, T, W) for N hops at once and gives (N, features) in float64; W is the width, and
P = B x T tokens are treated alike. Logarithms make scales additive, so that a median is a fair centre for them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from verifier.streams import Floats

MARGINAL = ("l1", "l2", "sign_flips", "sliced_wasserstein")
TRANSITION = ("turn", "sign_changes", "step_size", "gain", "mean_step", "mean_step_turn", "step_shape")
TOKENS = ("worst_turn", "longest_step", "shortest_step", "highest_gain", "lowest_gain")

_TINY = 1e-20
# Below this share of changed signs a logarithm would only magnify counting noise.
_SIGN_FLOOR = 1e-3


@cache
def projections(width: int, count: int = 8) -> Tensor:
    """(W, count) fixed random unit directions for the sliced Wasserstein distance."""
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, count, generator=generator)
    return drawn / drawn.norm(dim=0)


def marginal_distances(outputs: Tensor, mean: Tensor, directions: Tensor) -> Floats:
    """The paper's four distances (section 3) of outputs (N, B, T, W) to the stream's EMA (T, W): (N, 4).

    L1: mean absolute difference. L2: norm of the difference over the norm of the EMA. Sign flips: share of elements
    whose sign differs. Sliced Wasserstein: mean W1 between the sorted projections. The paper's exact formulas are not
    known; these are the plain readings of their names.
    """
    n, b = outputs.shape[:2]
    away = outputs - mean
    l1 = away.abs().mean((1, 2, 3))
    l2 = away.square().mean((1, 2, 3)).sqrt() / mean.square().mean().sqrt().clamp_min(_TINY)
    flips = (outputs.signbit() != mean.signbit()).float().mean((1, 2, 3))
    sliced = _sorted_projections(outputs.flatten(1, 2), directions)
    reference = _sorted_projections(mean[None], directions).repeat_interleave(b, dim=1)
    wasserstein = (sliced - reference).abs().mean((1, 2))
    return _columns(n, l1, l2, flips, wasserstein)


def log_marginal(distances: Floats) -> Floats:
    """Marginal distances on logarithmic scales: (N, 4)."""
    logs: Floats = np.log(distances + np.array([_TINY, _TINY, _SIGN_FLOOR, _TINY]))
    return logs


def _sorted_projections(tokens: Tensor, directions: Tensor) -> Tensor:
    return torch.sort(tokens @ directions, dim=1).values


def mean_steps(inputs: Tensor, outputs: Tensor) -> Tensor:
    """(N, W) the step y - x averaged over tokens."""
    return outputs.mean((1, 2)) - inputs.mean((1, 2))


def transition(inputs: Tensor, outputs: Tensor, mean_step: Tensor) -> Floats:
    """How outputs y follow from inputs x, both (N, B, T, W), given the stream's mean step (W,): (N, 12).

    A transformer stage is a residual map y = x + f(x), and so is its backward map. The first seven are `TRANSITION`,
    over all tokens; the last five are `TOKENS`, the tails over single tokens.
    """
    n = outputs.shape[0]
    x, y = inputs.flatten(1, 2), outputs.flatten(1, 2)
    step = y - x
    xx, yy, dd = _squares(x), _squares(y), _squares(step)
    cosine = (xx + yy - dd) / 2 / (xx * yy).sqrt().clamp_min(_TINY)
    turn, bend = 1 - cosine, torch.log(dd + _TINY) - torch.log(xx + _TINY)
    gain = torch.log(yy + _TINY) - torch.log(xx + _TINY)
    sum_xx, sum_yy, sum_dd = xx.sum(1) + _TINY, yy.sum(1) + _TINY, dd.sum(1) + _TINY
    changes = (x.signbit() != y.signbit()).float().mean((1, 2))
    spread = (sum_dd / x.shape[1]).sqrt()
    own = step.mean(1)
    wander = (own - mean_step).norm(dim=1) / spread
    along = torch.nn.functional.cosine_similarity(own, mean_step[None], dim=1)
    shape = step.abs().mean((1, 2)) * x.shape[2] ** 0.5 / spread
    return _columns(
        n,
        torch.log(turn.mean(1).clamp_min(1e-6)),
        torch.log(changes + _SIGN_FLOOR),
        torch.log(sum_dd / sum_xx),
        torch.log(sum_yy / sum_xx),
        torch.log(wander + _TINY),
        along,
        torch.log(shape + _TINY),
        torch.log(turn.amax(1).clamp_min(1e-6)),
        bend.amax(1),
        bend.amin(1),
        gain.amax(1),
        gain.amin(1),
    )


def _squares(tokens: Tensor) -> Tensor:
    return torch.einsum("npw,npw->np", tokens, tokens)


def _columns(n: int, *features: Tensor) -> Floats:
    stacked: Floats = torch.stack([feature.reshape(n) for feature in features], dim=1).double().numpy()
    return stacked
