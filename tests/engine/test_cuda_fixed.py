"""Work in fixed sizes gives the results of work in any size, and all of it is recorded when the model is loaded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_whisper import SHAPES, drawn
from tests.engine.test_cuda_engine import CPU, SPREAD, audio
from whisperd.errors import OutOfMemory
from whisperd.speech.features import LogMel
from whisperd.speech.tokenizer import Vocabulary

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.graphs import Action, FixedWindows, pieces, sizes
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Runner


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
    """Windows that are encoded in pieces, through reused buffers, fill their slots as if encoded at once."""
    runner = Runner(drawn(SHAPES["smoke"], seed=2, spread=SPREAD), vocabulary, device=CPU, dtype=torch.float32, slots=5)
    spectrogram = torch.zeros(runner.shape.n_mels, 3000)
    sounds, windows = [audio(key) for key in range(5)], [4, 0, 3, 1, 2]
    runner.encode(sounds, windows)
    caches = runner.decoder.caches
    expected = caches.cross_keys.clone(), caches.cross_values.clone()
    for most in (1, 2, 3):
        fixed = FixedWindows(runner.read_windows, most=most, spectrogram=spectrogram)
        for repeat in (sounds[::-1], sounds):
            spectrograms = torch.stack([torch.from_numpy(LogMel(runner.shape.n_mels)(one)) for one in repeat])
            with torch.inference_mode():
                fixed(spectrograms, torch.tensor(windows))
        torch.testing.assert_close(caches.cross_keys, expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(caches.cross_values, expected[1], atol=1e-4, rtol=1e-4)
    runner.close()


def prompted(vocabulary: Vocabulary, row: int, temperature: float = 0.0) -> RowPlan:
    """Prefixes of 2, 5 and 72 tokens: shorter than a chunk, longer than the short one, and of three chunks."""
    prompt = (vocabulary.sot_prev, *range(200, 200 + {0: 0, 3: 2, 7: 69}[row]))
    return RowPlan(prefix=(*prompt, vocabulary.sot), start_at=len(prompt), temperature=temperature, max_tokens=8 + row)


@pytest.mark.parametrize("beams", [False, True])
def test_fixed_sizes_write_the_same(vocabulary: Vocabulary, beams: bool) -> None:
    """Prefixes, steps and searches of fixed sizes give the same texts as any size, for rows and their neighbours."""
    found = []
    for fixed in (False, True):
        checkpoint = drawn(SHAPES["smoke"], seed=2, spread=SPREAD)
        runner = Runner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=10)
        if fixed:
            runner.record(None)
        rows = [7, 0, 3]
        runner.encode([audio(key) for key in range(3)], rows)
        if beams:
            runner.begin_beams(rows, 7, prompted(vocabulary, 7))
        else:
            runner.begin(rows, rows, [prompted(vocabulary, row) for row in rows])
        for _ in range(5):
            if beams:
                runner.decode_beams([rows], 4)
            else:
                runner.decode(rows, 4)
        assert runner.progress(rows)[0] == rows
        found.append(runner.beam_texts(rows) if beams else runner.texts(rows))
        runner.close()
    assert [text.tokens for text in found[0]] == [text.tokens for text in found[1]]
    for one, other in zip(*found, strict=True):
        assert one.sum_logprob == pytest.approx(other.sum_logprob, abs=1e-3)
        assert one.no_speech_prob == pytest.approx(other.no_speech_prob, abs=1e-5)
    assert beams or [len(text.tokens) for text in found[0]] == [15, 8, 11]


class Recorder:
    """Records actions as CUDA graphs do, by running them; the ``fails_at``th runs out of memory."""

    def __init__(self, fails_at: int = 0) -> None:
        self.count = 0
        self._fails_at = fails_at

    def __call__(self, action: Action) -> Action:
        self.count += 1
        action()
        if self.count == self._fails_at:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            finally:  # torch.cuda.graph ends a failed capture like this
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return action


def test_everything_is_recorded_at_load(vocabulary: Vocabulary) -> None:
    """The largest of each kind comes first, and progress counts all of them."""
    runner = Runner(drawn(SHAPES["smoke"], seed=2), vocabulary, device=CPU, dtype=torch.float32, slots=20)
    seen: list[tuple[int, int]] = []
    recorder = Recorder()
    runner.record(recorder, lambda done, of: seen.append((done, of)))
    assert runner.recorded is not None
    assert [done for done, _ in seen] == list(range(1, 1 + recorder.count))
    assert {of for _, of in seen} == {recorder.count}
    assert [size for size, _ in runner.recorded.step.actions][::3] == [20, 16, 8]
    assert list(runner.recorded.encode.actions) == [8, 4, 2, 1]
    assert next(iter(runner.recorded.read.actions)) == (8, 32)
    runner.close()


def test_no_memory_for_a_graph(vocabulary: Vocabulary) -> None:
    """Memory that runs out during a recording is OutOfMemory, although torch's last error does not say so."""
    runner = Runner(drawn(SHAPES["smoke"], seed=2), vocabulary, device=CPU, dtype=torch.float32, slots=20)
    with pytest.raises(OutOfMemory, match="not enough memory"):
        runner.record(Recorder(fails_at=3))
    runner.close()
