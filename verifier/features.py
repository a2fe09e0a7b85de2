"""What is measured on a tensor: its distances to the stream, and how it follows from its input.

Everything is one pass over (N, B, T, W) for N hops at once and gives (N, features) in float64; W is the width, and
P = B x T tokens are treated alike. Logarithms make scales additive, so that a median is a fair centre for them.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verifier.streams import Floats, Mask

MARGINAL = ("l1", "l2", "sign_flips", "sliced_wasserstein")
TRANSITION = ("turn", "sign_changes", "step_size", "push", "mean_step", "mean_step_turn", "step_shape")
TOKENS = ("worst_turn", "longest_step", "shortest_step", "highest_push", "lowest_push")

Singles = npt.NDArray[np.float32]

TINY = 1e-20
# Below this share of changed signs a logarithm would only magnify counting noise.
_SIGN_FLOOR = 1e-3
# Numbers that a core keeps at hand: three arrays of as many are 768 KiB.
_CACHED = 1 << 16
LEAST = (TINY, TINY, _SIGN_FLOOR, TINY)
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
    sent, usual = _array(outputs), _array(mean)
    distances = np.empty((len(sent), len(MARGINAL)))
    with np.errstate(all="ignore"):  # What is not finite shows as such.
        rows = (sent - usual).reshape(len(sent), -1)
        scale = max(float(np.vdot(usual, usual) / usual.size) ** 0.5, TINY)
        distances[:, 1] = np.sqrt(np.vecdot(rows, rows) / rows.shape[1]) / scale
        distances[:, 0] = _sizes(rows)
        distances[:, 2] = _changed_signs(sent, usual)
        sliced = _sorted_projections(sent.reshape(len(sent), -1, sent.shape[-1]), directions)
        reference = _sorted_projections(usual[None], directions).repeat(sent.shape[1], axis=2)
        distances[:, 3] = np.abs(sliced - reference).sum((1, 2)) / sliced[0].size
    return distances


def _blocks(hops: Singles) -> list[slice]:
    """Slices of hops (N, ...) of as many as stay in a core's cache from one operation to the next."""
    each = max(1, _CACHED // max(1, hops[0].size))
    return [slice(start, start + each) for start in range(0, len(hops), each)]


def _array(tensor: Tensor) -> Singles:
    array: Singles = tensor.float().numpy()
    return array


@lru_cache(maxsize=64)
def ones(count: int) -> Singles:
    """(count,) ones, to be read only: a product with them is the fastest sum."""
    return np.ones(count, dtype=np.float32)


def _sizes(rows: Singles) -> Singles:
    """(N,) mean absolute value of rows (N, elements), which are overwritten."""
    sizes: Singles = np.abs(rows, out=rows) @ ones(rows.shape[1]) / rows.shape[1]
    return sizes


def _changed_signs(these: Singles, those: Singles) -> Floats:
    """(N,) share of elements of these (N, ...) whose sign is not that of those, which may be fewer dimensions."""
    differ = _negative(these) != _negative(those)
    share: Floats = np.array([np.count_nonzero(one) for one in differ]) / differ[0].size
    return share


def _negative(numbers: Singles) -> Mask:
    # The sign bit: integers compare with 0 faster than floats, and -0.0 is as good as any tiny number.
    negative: Mask = numbers.view(np.int32) < 0
    return negative


def log_marginal(distances: Floats) -> Floats:
    """Marginal distances on logarithmic scales: (N, 4)."""
    logs: Floats = np.log(distances + np.array(LEAST))
    return logs


def _sorted_projections(tokens: Singles, directions: Tensor) -> Singles:
    """(N, directions, P) projections of tokens (N, P, W), ascending along the last dimension."""
    projected = tokens @ directions.numpy()
    return np.sort(np.ascontiguousarray(projected.transpose(0, 2, 1)), axis=2)


def transition(inputs: Tensor, outputs: Tensor, mean_step: Tensor | None) -> tuple[Floats, Singles]:
    """How outputs y follow from inputs x, both (N, B, T, W): (N, 12), and the mean steps y - x over tokens (N, W).

    `mean_step` (W,) is what is usual of those in the stream; None takes the hops' median.

    A transformer stage is a residual map y = x + f(x), and so is its backward map. The first seven are `TRANSITION`,
    over all tokens; the last five are `TOKENS`, the tails over single tokens.
    """
    count, *_, width = outputs.shape
    x, y = (_array(one).reshape(count, -1, width) for one in (inputs, outputs))
    tokens = x.shape[1]
    steps = np.empty((count, width), dtype=np.float32)
    xx, yy, dd = np.empty((3, count, tokens))
    roughness, changes = np.empty((2, count))
    with np.errstate(all="ignore"):  # What is not finite shows as such in the features.
        for some in _blocks(y):
            step = y[some] - x[some]
            steps[some] = ones(tokens) @ step / tokens
            for lengths, one in ((xx, x[some]), (yy, y[some]), (dd, step)):
                lengths[some] = np.vecdot(one, one)
            roughness[some] = _sizes(step.reshape(len(step), -1))
            changes[some] = _changed_signs(x[some], y[some])
        usual = _array(torch.from_numpy(steps).nanmedian(0).values if mean_step is None else mean_step)
        lx = np.sqrt(xx)
        sum_xx, sum_yy, sum_dd = (one.sum(1) + TINY for one in (xx, yy, dd))
        turn = 1 - (xx + yy - dd) / 2 / np.maximum(lx * np.sqrt(yy), TINY)
        bend = np.log(dd + TINY) - np.log(xx + TINY)
        # How much of the step is along the input: free of the step's size, which grows a lot in training.
        push = (yy - xx - dd) / 2 / np.maximum(lx * np.sqrt(dd), TINY)
        spread = np.sqrt(sum_dd / tokens)
        wander = _lengths(steps - usual) / spread
        along = steps @ usual / np.maximum(_lengths(steps) * _lengths(usual), TINY)
        shape = roughness * width**0.5 / spread
        columns = (
            np.log(np.maximum(turn.sum(1) / tokens, 1e-6)),
            np.log(changes + _SIGN_FLOOR),
            np.log(sum_dd) - np.log(sum_xx),
            (sum_yy - sum_xx - sum_dd) / 2 / np.sqrt(sum_xx * sum_dd),
            np.log(wander + TINY),
            np.log(np.maximum(1 - along, 0) + 0.01),
            np.log(shape + TINY),
            np.log(np.maximum(turn.max(1), 1e-6)),
            bend.max(1),
            bend.min(1),
            push.max(1),
            push.min(1),
        )
    return np.array(columns).T, steps


def mean_tensor(outputs: Tensor) -> Tensor:
    """(T, W) the mean of outputs (N, B, T, W)."""
    return torch.from_numpy(mean_of(_array(outputs).reshape(-1, *outputs.shape[2:])))


def mean_of(sequences: Singles) -> Singles:
    """(T, W) the mean of sequences (n, T, W)."""
    count, *shape = sequences.shape
    # A product with ones takes a third of the time of a mean over the leading dimension.
    mean: Singles = ones(count).dot(sequences.reshape(count, -1)).reshape(shape) / np.float32(count)
    return mean


def _lengths(rows: Singles) -> Floats:
    lengths: Floats = np.sqrt(np.vecdot(rows, rows).astype(np.float64))
    return lengths
