"""Token times: the cheapest path through the attention of the alignment heads.

The method is openai-whisper's ``timing.py``: scores are normalised over the text, smoothed over time, averaged over the
heads, and walked by dynamic time warping (DTW) for many windows at once. On a GPU with Triton the kernels of
``alignment_kernel`` walk; the operations here give the same result and run everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.engine.base import TokenTime
from whisperd.speech.units import ENCODER_STATES_PER_S, MEDIAN_FILTER_WIDTH


def attention_matrix(scores: Tensor) -> Tensor:
    """float32 [heads, text, frames] before the softmax, cut to the real audio, to [text, frames].

    A frame that says nothing, as the only one of very short audio, counts as 0.
    """
    weights = scores.softmax(dim=-1)
    deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, correction=0)
    return _median_filtered(((weights - mean) / deviation).nan_to_num(0.0)).mean(dim=0)


def _median_filtered(weights: Tensor) -> Tensor:
    half = MEDIAN_FILTER_WIDTH // 2
    if weights.shape[-1] <= half:
        return weights
    padded = functional.pad(weights, (half, half, 0, 0), mode="reflect")
    return padded.unfold(-1, MEDIAN_FILTER_WIDTH, 1).median(dim=-1).values


def token_times(
    tokens: Sequence[int], starts: Sequence[float], probabilities: Sequence[float]
) -> tuple[TokenTime, ...]:
    """A token starts where the path first reaches it and ends where the next one starts; ``starts`` has one more."""
    edges_s = [frame / ENCODER_STATES_PER_S for frame in starts]
    return tuple(
        TokenTime(token=token, start_s=edges_s[index], end_s=edges_s[index + 1], probability=probability)
        for index, (token, probability) in enumerate(zip(tokens, probabilities, strict=True))
    )


INFINITE = float("inf")


def joined(matrices: Sequence[Tensor]) -> Tensor:
    """[rows, columns] each to float64 [n, most rows, most columns], padded with 0."""
    n_rows, n_columns = (max(matrix.shape[side] for matrix in matrices) for side in (0, 1))
    found = matrices[0].new_zeros((len(matrices), n_rows, n_columns), dtype=torch.float64)
    for place, matrix in zip(found, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return found


def skewed(costs: Tensor) -> Tensor:
    """[n, rows, columns] to [n, rows + columns - 1, rows]: antidiagonals, infinite outside of the matrix."""
    count, n_rows, n_columns = costs.shape
    length = n_rows + n_columns - 1
    # each row is one longer than its place, so that it starts one further right than the row above
    wide = functional.pad(costs, (0, n_rows), value=INFINITE).flatten(1)[:, : n_rows * length]
    return wide.view(count, n_rows, length).transpose(1, 2).contiguous()


def first_columns(costs: Tensor, n_rows: Tensor, n_columns: Tensor) -> Tensor:
    """The column where the cheapest path first reaches each row.

    Args:
        costs: float64 [n, rows, columns]; each matrix is padded at its end.
        n_rows: int64 [n], how many rows of each are real.
        n_columns: int64 [n], how many columns.

    Returns:
        int64 [n, rows]; 0 for rows that are padding.
    """
    if costs.is_cuda and _has_triton():
        from whisperd.engine.cuda.alignment_kernel import first_columns as by_kernel

        return by_kernel(skewed(costs), n_rows, n_columns)
    return _walked(_steps(skewed(costs)), n_rows, n_columns)


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def _steps(diagonals: Tensor) -> Tensor:
    """int64 like the diagonals: 0 came diagonally, 1 from the row above, 2 from the column before.

    Cells of one antidiagonal depend on the two before it only, so each is one operation.
    """
    count, length, n_rows = diagonals.shape
    steps = torch.empty_like(diagonals, dtype=torch.int64)
    older, newer = (diagonals.new_full((count, n_rows + 1), INFINITE) for _ in range(2))
    older[:, 0] = 0.0
    for at in range(length):
        diagonal, above, before = older[:, :-1], newer[:, :-1], newer[:, 1:]
        # as in openai-whisper, the column before wins every tie
        from_above = (above < diagonal) & (above < before)
        step = torch.where((diagonal < above) & (diagonal < before), 0, torch.where(from_above, 1, 2))
        steps[:, at] = step
        came = torch.where(step == 0, diagonal, torch.where(from_above, above, before))
        older, newer = newer, functional.pad(diagonals[:, at] + came, (1, 0), value=INFINITE)
    return steps


def _walked(steps: Tensor, n_rows: Tensor, n_columns: Tensor) -> Tensor:
    """Walks from the last corner of each matrix to its first."""
    count, length, most_rows = steps.shape
    firsts = torch.zeros((count, most_rows), dtype=torch.int64, device=steps.device)
    which = torch.arange(count, device=steps.device)
    row, column = n_rows - 1, n_columns - 1
    for _ in range(length):
        inside = (row >= 0) & (column >= 0)
        at, diagonal = row.clamp(min=0), (row + column).clamp(min=0)
        firsts[which, at] = torch.where(inside, column, firsts[which, at])
        step = steps[which, diagonal, at]
        row, column = row - (inside & (step != 2)).long(), column - (inside & (step != 1)).long()
    return firsts
