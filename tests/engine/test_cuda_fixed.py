"""What runs fast on a GPU, as far as a CPU can tell: padded steps, and the attention kernel in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_whisper import SHAPES, drawn
from tests.engine.test_cuda_engine import CPU, SPREAD, audio
from whisperd.speech.tokenizer import Vocabulary

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.graphs import FixedSteps, FixedWindows, pieces, sizes
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Runner

COMPARED = """
import torch
from whisperd.engine.cuda.caches import Scales, gathered
from whisperd.engine.cuda.kernels import slotted

torch.manual_seed(0)
for positions, live in ((1500, [1500, 1500, 1500]), (448, [1, 200, 448]), (448, [64, 65, 7])):
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        keys, values = torch.randn(2, 5, 3, positions, 16, dtype=dtype)
        query = torch.randn(3, 1, 3, 16, dtype=dtype).transpose(1, 2)
        given = (query, keys, values, torch.tensor([4, 0, 2]), torch.tensor(live), positions)
        assert (slotted(*given).float() - gathered(*given).float()).abs().max() < limit, (positions, live, dtype)
        small, scales = torch.rand(2, 5, 3, positions, 16) * 800 - 400, torch.rand(2, 5, 3)
        small = small.to(torch.float8_e4m3fn)
        given = (query, *small, *given[3:], Scales(keys=scales[0] / 100, values=scales[1] / 100))
        assert (slotted(*given).float() - gathered(*given).float()).abs().max() < 4 * limit, (positions, live, dtype)
print("equal")
"""


@given(most=st.integers(1, 300), count=st.integers(1, 300))
def test_sizes(most: int, count: int) -> None:
    """Any number of rows has a size, which is at most twice what it needs."""
    if count <= most:
        size = next(size for size in sizes(most) if size >= count)
        assert size <= max(8, 2 * count)


@given(count=st.integers(0, 300), most=st.integers(1, 40))
def test_pieces(count: int, most: int) -> None:
    """Any number of windows is a sum of few fixed sizes, the largest first, none beyond the limit."""
    found = pieces(count, most)
    assert sum(found) == count
    assert list(found) == sorted(found, reverse=True)
    assert set(found) <= {1, 2, 4, 8, 16, 32}
    assert max(found, default=1) <= most
    assert len(found) <= count // max(found, default=1) + 5


def test_pieces_are_read_as_a_whole(vocabulary: Vocabulary) -> None:
    """Windows that are encoded in pieces, through buffers that are used again, lie in their slots as if all at once."""
    runner = Runner(drawn(SHAPES["smoke"], seed=2, spread=SPREAD), vocabulary, device=CPU, dtype=torch.float32, slots=5)
    spectrogram = torch.zeros(runner.shape.n_mels, 3000)
    sounds, windows = [audio(key) for key in range(5)], [4, 0, 3, 1, 2]
    runner.encode(sounds, windows)
    caches = runner._decoder.caches
    expected = caches.cross_keys.clone(), caches.cross_values.clone()
    for most in (1, 2, 3):
        runner.fixed_windows = FixedWindows(runner.read_windows, most=most, spectrogram=spectrogram, record=None)
        for repeat in (sounds[::-1], sounds):
            runner.encode(repeat, windows)
        torch.testing.assert_close(caches.cross_keys, expected[0])
        torch.testing.assert_close(caches.cross_values, expected[1])
    runner.close()


def test_padded_steps_write_the_same(vocabulary: Vocabulary) -> None:
    """Steps of fixed sizes write what steps of any size write, greedy rows and their neighbours alike."""
    texts = []
    for fixed in (False, True):
        found = drawn(SHAPES["smoke"], seed=2, spread=SPREAD)
        runner = Runner(found, vocabulary, device=CPU, dtype=torch.float32, slots=10)
        if fixed:
            runner.fixed = FixedSteps(runner.write_next, most=10, padding=10, device=CPU, record=None)
        rows = [7, 0, 3]
        runner.encode([audio(key) for key in range(3)], rows)
        runner.begin(rows, rows, [RowPlan(prefix=(vocabulary.sot,), max_tokens=8 + row) for row in rows])
        for _ in range(5):
            runner.decode(rows, 4)
        assert runner.progress(rows)[0] == rows
        texts.append([text.tokens for text in runner.texts(rows)])
        runner.close()
    assert texts[0] == texts[1]
    assert [len(tokens) for tokens in texts[0]] == [15, 8, 11]


def test_kernel_in_the_interpreter() -> None:
    """One kernel for the audio and for texts of any length: equal to gathered attention."""
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", COMPARED],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "equal\n", run.stderr
