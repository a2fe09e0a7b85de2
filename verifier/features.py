"""What is measured on a tensor: its distances to the stream, and how it follows from its input.

Everything is one pass over (N, B, T, W) for N hops at once and gives (N, features) in float64; W is the width, and
P = B x T tokens are treated alike. Logarithms make scales additive, so that a median is a fair centre for them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verifier.streams import Floats

MARGINAL = ("l1", "l2", "sign_flips", "sliced_wasserstein")
TRANSITION = ("turn", "sign_changes", "step_size", "push", "mean_step", "mean_step_turn", "step_shape")
TOKENS = ("worst_turn", "longest_step", "shortest_step", "highest_push", "lowest_push")

_TINY = 1e-20
# Below this share of changed signs a logarithm would only magnify counting noise.
_SIGN_FLOOR = 1e-3
LEAST = (_TINY, _TINY, _SIGN_FLOOR, _TINY)
"""What is added to each marginal distance before its logarithm is taken."""


@cache
def projections(width: int, count: int = 8) -> Tensor:
    """(W, count) fixed random unit directions for the sliced Wasserstein distance."""
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, count, generator=generator)
    unit: Tensor = drawn / drawn.norm(dim=0)
    return unit


def marginal_distances(outputs: Tensor, mean: Tensor, directions: Tensor) -> Floats:
    """The paper's four distances (section 3) of outputs (N, B, T, W) to the stream's EMA (T, W): (N, 4).

    L1: mean absolute difference. L2: norm of the difference over the norm of the EMA. Sign flips: share of elements
    whose sign differs. Sliced Wasserstein: mean W1 between the sorted projections. The paper's exact formulas are not
    known; these are the plain readings of their names.
    """
    away = (outputs - mean).flatten(1)
    elements = away.shape[1]
    spread = torch.linalg.vector_norm(away, dim=1) / elements**0.5
    l2 = spread / mean.square().mean().sqrt().clamp_min(_TINY)
    l1 = away.abs_().sum(1) / elements
    flips = _changed_signs(outputs, mean, away)
    sliced = _sorted_projections(outputs.flatten(1, 2), directions)
    reference = _sorted_projections(mean[None], directions).repeat(outputs.shape[1], axis=2)
    wasserstein = np.abs(sliced - reference).mean((1, 2))
    columns = (l1.numpy(), l2.numpy(), flips.numpy(), wasserstein)
    return np.stack(columns, axis=1, dtype=np.float64)


def log_marginal(distances: Floats) -> Floats:
    """Marginal distances on logarithmic scales: (N, 4)."""
    logs: Floats = np.log(distances + np.array(LEAST))
    return logs


def _sorted_projections(tokens: Tensor, directions: Tensor) -> npt.NDArray[np.float32]:
    """(N, directions, P) projections of tokens (N, P, W), ascending along the last dimension."""
    projected = (tokens @ directions).float().transpose(1, 2).contiguous()
    # NumPy sorts several times as fast, since it does not say where each came from.
    return np.sort(projected.numpy(), axis=2)


def _changed_signs(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    """(N,) share of elements of a (N, ...) and b whose sign differs; a zero counts half. `scratch` is overwritten."""
    product = torch.mul(a, b, out=scratch.view(a.shape)).flatten(1)
    return (1 - product.sign_().sum(1) / product.shape[1]) / 2


def mean_steps(inputs: Tensor, outputs: Tensor) -> Tensor:
    """(N, W) the step y - x averaged over tokens."""
    return outputs.flatten(1, 2).mean(1) - inputs.flatten(1, 2).mean(1)


def transition(inputs: Tensor, outputs: Tensor, steps: Tensor, mean_step: Tensor) -> Floats:
    """How outputs y follow from inputs x, both (N, B, T, W): (N, 12).

    `steps` (N, W) are their `mean_steps`, `mean_step` (W,) is what is usual of those in the stream.

    A transformer stage is a residual map y = x + f(x), and so is its backward map. The first seven are `TRANSITION`,
    over all tokens; the last five are `TOKENS`, the tails over single tokens.
    """
    x, y = inputs.flatten(1, 2), outputs.flatten(1, 2)
    step = y - x
    # Lengths of tokens (N, P) are few numbers: from here on NumPy, whose small operations are quicker.
    lx, ly, ld = (torch.linalg.vector_norm(one, dim=2).double().numpy() for one in (x, y, step))
    own, usual = steps.double().numpy(), mean_step.double().numpy()
    # The step's memory is used again: a fresh tensor costs more than what is done with it.
    roughness = step.abs_().sum((1, 2)).double().numpy() / step[0].numel()
    changes = _changed_signs(x, y, step).double().numpy()
    with np.errstate(all="ignore"):  # What is not finite shows as such in the features.
        xx, yy, dd = np.square(lx), np.square(ly), np.square(ld)
        sum_xx, sum_yy, sum_dd = (one.sum(1) + _TINY for one in (xx, yy, dd))
        turn = 1 - (xx + yy - dd) / 2 / np.maximum(lx * ly, _TINY)
        bend = np.log(dd + _TINY) - np.log(xx + _TINY)
        # How much of the step is along the input: free of the step's size, which grows a lot in training.
        push = (yy - xx - dd) / 2 / np.maximum(lx * ld, _TINY)
        spread = np.sqrt(sum_dd / x.shape[1])
        wander = _lengths(own - usual) / spread
        along = own @ usual / np.maximum(_lengths(own) * _lengths(usual), _TINY)
        shape = roughness * x.shape[2] ** 0.5 / spread
        columns = (
            np.log(np.maximum(turn.mean(1), 1e-6)),
            np.log(changes + _SIGN_FLOOR),
            np.log(sum_dd) - np.log(sum_xx),
            (sum_yy - sum_xx - sum_dd) / 2 / np.sqrt(sum_xx * sum_dd),
            np.log(wander + _TINY),
            np.log(np.maximum(1 - along, 0) + 0.01),
            np.log(shape + _TINY),
            np.log(np.maximum(turn.max(1), 1e-6)),
            bend.max(1),
            bend.min(1),
            push.max(1),
            push.min(1),
        )
        features: Floats = np.stack(columns, axis=1)
    return features


def _lengths(rows: Floats) -> Floats:
    lengths: Floats = np.sqrt(np.square(rows).sum(-1))
    return lengths
