"""When each token is spoken: the cheapest path through the attention of the heads that follow the audio.

The method is openai-whisper's ``timing.py``: scores are normalised over the text, smoothed over time, averaged over the
heads, and walked by dynamic time warping.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from whisperd.engine.base import TokenTime

MEDIAN_FILTER_WIDTH = 7
ENCODER_STATES_PER_S = 50

Matrix = NDArray[np.float32]


def attention_matrix(scores: Tensor) -> Tensor:
    """float32 [heads, text, frames] before the softmax, cut to the real audio, to [text, frames]."""
    weights = scores.softmax(dim=-1)
    deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, correction=0)
    return _median_filtered((weights - mean) / deviation).mean(dim=0)


def _median_filtered(weights: Tensor) -> Tensor:
    half = MEDIAN_FILTER_WIDTH // 2
    if weights.shape[-1] <= half:
        return weights
    padded = functional.pad(weights, (half, half, 0, 0), mode="reflect")
    return padded.unfold(-1, MEDIAN_FILTER_WIDTH, 1).median(dim=-1).values


def first_frames(matrix: Matrix) -> NDArray[np.intp]:
    """The frame where the best monotonic path first reaches each row of the text."""
    text_at, frame_at = _path(-matrix.astype(np.float64))
    firsts: NDArray[np.intp] = frame_at[np.diff(text_at, prepend=-1) > 0]
    return firsts


def token_times(
    tokens: Sequence[int], starts: Sequence[int] | NDArray[np.intp], probabilities: Sequence[float]
) -> tuple[TokenTime, ...]:
    """A token starts where the path first reaches it and ends where the next one starts; ``starts`` has one more."""
    edges_s = [float(frame) / ENCODER_STATES_PER_S for frame in starts]
    return tuple(
        TokenTime(token=token, start_s=edges_s[index], end_s=edges_s[index + 1], probability=probability)
        for index, (token, probability) in enumerate(zip(tokens, probabilities, strict=True))
    )


def _path(costs: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The cheapest path from the first corner to the last: rows and columns, in order."""
    steps = _steps(costs)
    row, column = costs.shape
    path = []
    while row > 0 and column > 0:
        path.append((row - 1, column - 1))
        step = steps[row, column]
        row -= int(step != 2)
        column -= int(step != 1)
    rows, columns = np.array(path[::-1], dtype=np.intp).T
    return rows, columns


def _steps(costs: NDArray[np.float64]) -> NDArray[np.int8]:
    """int8 [rows + 1, columns + 1]: 0 came diagonally, 1 from the row above, 2 from the column before.

    Cells of one antidiagonal depend on the two before it only, so each is one operation.
    """
    n_rows, n_columns = costs.shape
    steps = np.zeros((n_rows + 1, n_columns + 1), np.int8)
    totals = np.full((n_rows + 1, n_columns + 1), np.inf)
    totals[0, 0] = 0.0
    for diagonal in range(2, n_rows + n_columns + 1):
        row = np.arange(max(1, diagonal - n_columns), min(n_rows, diagonal - 1) + 1)
        column = diagonal - row
        ways = np.stack([totals[row - 1, column - 1], totals[row - 1, column], totals[row, column - 1]])
        # as in openai-whisper, the column before wins every tie
        above = (ways[1] < ways[0]) & (ways[1] < ways[2])
        best = np.where((ways[0] < ways[1]) & (ways[0] < ways[2]), 0, np.where(above, 1, 2))
        steps[row, column] = best
        totals[row, column] = costs[row - 1, column - 1] + np.take_along_axis(ways, best[None], axis=0)[0]
    return steps
