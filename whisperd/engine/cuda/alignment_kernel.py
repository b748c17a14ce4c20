"""The cheapest paths of ``alignment.first_columns`` as two Triton kernels, one program for each window.

Checked against it in Triton's interpreter on the CPU only: IT HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(diagonals, totals, steps, length, n_rows, BLOCK: tl.constexpr):
    """``totals`` [n, 3, n_rows + 1]: the last three antidiagonals, each behind a cell for the row before the first."""
    window = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    there = row < n_rows
    ring = totals + window * 3 * (n_rows + 1)
    for at in range(length):
        tl.debug_barrier()  # what the threads of this program wrote is read by their neighbours
        older = ring + ((at + 1) % 3) * (n_rows + 1)
        newer = ring + ((at + 2) % 3) * (n_rows + 1)
        diagonal = tl.load(older + row, mask=there, other=0.0)
        above = tl.load(newer + row, mask=there, other=0.0)
        before = tl.load(newer + row + 1, mask=there, other=0.0)
        place = (window * length + at) * n_rows + row
        cost = tl.load(diagonals + place, mask=there, other=0.0)
        from_diagonal = (diagonal < above) & (diagonal < before)
        from_above = (above < diagonal) & (above < before)
        came = tl.where(from_diagonal, diagonal, tl.where(from_above, above, before))
        step = tl.where(from_diagonal, 0, tl.where(from_above, 1, 2))
        tl.store(steps + place, step.to(tl.int8), mask=there)
        tl.store(ring + (at % 3) * (n_rows + 1) + row + 1, cost + came, mask=there)
        # the cell before the first row is free of charge at the start only
        tl.store(ring + (at % 3) * (n_rows + 1) + row, float("inf"), mask=row == 0)


@triton.jit
def _backward(steps, firsts, rows, columns, length, n_rows):
    window = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + window) - 1
    column = tl.load(columns + window) - 1
    while (row >= 0) & (column >= 0):
        tl.store(firsts + window * n_rows + row, column)
        step = tl.load(steps + (window * length + row + column) * n_rows + row)
        row -= tl.where(step != 2, 1, 0)
        column -= tl.where(step != 1, 1, 0)


def first_columns(diagonals: Tensor, n_rows: Tensor, n_columns: Tensor) -> Tensor:
    """The same as ``alignment.first_columns``, for the output of ``alignment.skewed``."""
    count, length, most_rows = diagonals.shape
    totals = diagonals.new_full((count, 3, most_rows + 1), float("inf"))
    totals[:, 1, 0] = 0.0
    steps = torch.empty_like(diagonals, dtype=torch.int8)
    firsts = torch.zeros((count, most_rows), dtype=torch.int64, device=diagonals.device)
    _forward[(count,)](diagonals, totals, steps, length, most_rows, BLOCK=triton.next_power_of_2(most_rows))
    sizes = (n_rows.contiguous(), n_columns.contiguous())
    _backward[(count,)](steps, firsts, *sizes, length, most_rows, num_warps=1)
    return firsts
