"""The alignment path through the attention of many windows at once, compared with openai-whisper's."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.alignment import attention_matrix, first_columns, joined

COMPARED = """
import torch
from whisperd.engine.cuda import alignment
from whisperd.engine.cuda.alignment_kernel import first_columns

torch.manual_seed(0)
for levels in (3, 10**6):  # few levels make ties
    matrices = [-torch.randint(0, levels, size) / levels for size in ((5, 40), (1, 1), (17, 9), (2, 33), (1, 7))]
    sizes = torch.tensor([list(matrix.shape) for matrix in matrices])
    given = (alignment.joined(matrices), sizes[:, 0], sizes[:, 1])
    assert torch.equal(first_columns(alignment.skewed(given[0]), *given[1:]), alignment.first_columns(*given)), levels
print("equal")
"""

Costs = NDArray[np.float64]


def walked(costs: Costs) -> list[int]:
    """openai-whisper's ``dtw_cpu`` and ``backtrace``, cell by cell: the first column of the path in each row."""
    n_rows, n_columns = costs.shape
    totals = np.full((n_rows + 1, n_columns + 1), np.inf)
    trace = np.full((n_rows + 1, n_columns + 1), -1)
    totals[0, 0] = 0
    for column in range(1, n_columns + 1):
        for row in range(1, n_rows + 1):
            ways = (totals[row - 1, column - 1], totals[row - 1, column], totals[row, column - 1])
            step = 0 if ways[0] < min(ways[1:]) else 1 if ways[1] < min(ways[0], ways[2]) else 2
            totals[row, column] = costs[row - 1, column - 1] + ways[step]
            trace[row, column] = step
    trace[0, :], trace[:, 0] = 2, 1
    row, column = costs.shape
    firsts = [0] * n_rows
    while row > 0 or column > 0:
        if row > 0 and column > 0:
            firsts[row - 1] = column - 1
        step = int(trace[row, column])
        row, column = row - (step != 2), column - (step != 1)
    return firsts


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 25)), min_size=1, max_size=4),
    levels=st.sampled_from([2, 5, 10**9]),
)
def test_paths(seed: int, sizes: list[tuple[int, int]], levels: int) -> None:
    """Matrices of any sizes in one batch, with ties and without, have the path that each has alone."""
    generator = np.random.default_rng(seed)
    matrices = [generator.integers(-levels, levels, size) / levels for size in sizes]
    real = torch.tensor(sizes)
    found = first_columns(joined([torch.from_numpy(one) for one in matrices]), real[:, 0], real[:, 1]).tolist()
    for mine, matrix in zip(found, matrices, strict=True):
        expected = walked(matrix)
        assert mine[: len(expected)] == expected
        assert all(one <= other for one, other in pairwise(expected))
        assert not any(mine[len(expected) :])


def test_kernel_in_the_interpreter() -> None:
    """The kernel for GPUs finds the same paths."""
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", COMPARED],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "equal\n", run.stderr


def test_one_frame() -> None:
    """Audio of a single frame, for which the formula gives NaN, still has a path."""
    matrix = attention_matrix(torch.zeros(2, 4, 1))
    assert first_columns(-joined([matrix]), torch.tensor([4]), torch.tensor([1])).tolist() == [[0] * 4]
