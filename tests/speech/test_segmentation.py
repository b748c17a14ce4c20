"""The segmentation loses no speech, makes no window too long, and cuts in silence."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.speech.segmentation import WINDOW_FRAMES, Cut, CutOptions, Cutter, join_runs, speech_runs
from whisperd.speech.units import FRAME_SAMPLES, SAMPLE_RATE_HZ

WINDOW_SAMPLES = WINDOW_FRAMES * FRAME_SAMPLES


@st.composite
def probabilities(draw: st.DrawFn) -> np.ndarray:
    """Runs of speech and silence of up to 50 s each, with a little noise on top."""
    runs = draw(st.lists(st.tuples(st.integers(1, 1500), st.sampled_from([0.02, 0.2, 0.45, 0.6, 0.98])), max_size=8))
    levels = np.concatenate([np.full(n, level) for n, level in runs] or [np.zeros(0)])
    noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).uniform(-0.02, 0.02, len(levels))
    return (levels + noise).astype(np.float32)


def run(frames: np.ndarray, options: CutOptions, *, step: int = 10_000, tail_samples: int = FRAME_SAMPLES) -> list[Cut]:
    cutter = Cutter(options)
    cuts = []
    for at in range(0, len(frames), step):
        cuts += cutter.feed(frames[at : at + step])
    return cuts + cutter.finish(max(0, (len(frames) - 1) * FRAME_SAMPLES + tail_samples) if len(frames) else 0)


@given(probabilities(), st.integers(1, FRAME_SAMPLES))
def test_every_voiced_frame_is_in_a_window(frames: np.ndarray, tail_samples: int) -> None:
    """Each frame at or above the threshold lies in exactly one window."""
    cuts = run(frames, CutOptions(), tail_samples=tail_samples)
    covered = np.zeros(len(frames), int)
    for cut in cuts:
        covered[cut.span.start_samples // FRAME_SAMPLES : -(-cut.span.end_samples // FRAME_SAMPLES)] += 1
    assert (covered[frames >= 0.5] == 1).all()
    assert (covered <= 1).all()


@given(probabilities())
def test_without_skipping_windows_tile_the_audio(frames: np.ndarray) -> None:
    """With skip_silence off, windows follow each other without a gap from the first sample to the last."""
    cuts = run(frames, CutOptions(skip_silence=False))
    edges = [0] + [cut.span.end_samples for cut in cuts]
    assert [cut.span.start_samples for cut in cuts] == edges[:-1]
    assert edges[-1] == len(frames) * FRAME_SAMPLES


@given(probabilities(), st.booleans())
def test_windows_are_short_ordered_and_hold_their_speech(frames: np.ndarray, skip: bool) -> None:
    """No window exceeds 30 s, none overlaps the next, and the speech that a cut names lies inside it."""
    cuts = run(frames, CutOptions(skip_silence=skip))
    assert all(cut.span.end_samples <= later.span.start_samples for cut, later in pairwise(cuts))
    for cut in cuts:
        assert 0 < cut.span.end_samples - cut.span.start_samples <= WINDOW_SAMPLES
        for span in cut.speech:
            assert cut.span.start_samples <= span.start_samples < span.end_samples <= cut.span.end_samples


@given(probabilities(), st.integers(1, 997))
def test_the_size_of_the_feeds_does_not_matter(frames: np.ndarray, step: int) -> None:
    """Frames fed in pieces of any size give the same cuts."""
    assert run(frames, CutOptions(), step=step) == run(frames, CutOptions())


@given(probabilities())
def test_needed_samples_never_move_back_or_past_a_cut(frames: np.ndarray) -> None:
    """Every cut starts at or after what the cutter said it still needs."""
    cutter = Cutter(CutOptions())
    needed = 0
    for at in range(0, len(frames), 100):
        cuts = cutter.feed(frames[at : at + 100])
        assert all(cut.span.start_samples >= needed for cut in cuts)
        assert cutter.needed_from_samples >= needed
        needed = cutter.needed_from_samples


def ending_with_speech(duration_s: float, pattern: str) -> tuple[np.ndarray, int]:
    """Frames of audio of this length whose last half second is speech, and its samples."""
    n_samples = round(duration_s * SAMPLE_RATE_HZ)
    n_frames = -(-n_samples // FRAME_SAMPLES)
    seconds = np.arange(n_frames) * FRAME_SAMPLES / SAMPLE_RATE_HZ
    talking = {"talk": seconds >= 0, "silence": seconds < 0, "sentences": seconds % 7 < 5}[pattern]
    frames = np.where(talking, 0.95, 0.02).astype(np.float32)
    frames[(n_samples - SAMPLE_RATE_HZ // 2) // FRAME_SAMPLES :] = 0.95
    return frames, n_samples


@pytest.mark.parametrize("pattern", ["talk", "silence", "sentences"])
@pytest.mark.parametrize("skip", [True, False])
def test_the_last_half_second_of_any_length(pattern: str, skip: bool) -> None:
    """From 29.9 to 125 s in steps of 0.1 s, whatever came before, each sample is in exactly one window."""
    for tenths in range(299, 1251):
        frames, n_samples = ending_with_speech(tenths / 10, pattern)
        cutter = Cutter(CutOptions(skip_silence=skip))
        cuts = cutter.feed(frames) + cutter.finish(n_samples)
        left = n_samples - SAMPLE_RATE_HZ // 2
        for cut in cuts:
            assert 0 < cut.span.end_samples - cut.span.start_samples <= WINDOW_SAMPLES
            if cut.span.start_samples <= left < cut.span.end_samples:
                left = cut.span.end_samples
        assert left == n_samples, f"{tenths / 10} s: the last {n_samples - left} samples are in no window"


def test_a_pause_in_the_last_third_is_where_a_long_talk_is_cut() -> None:
    """Continuous speech with a pause of half a second at 25 s is cut inside that pause."""
    frames = np.full(1500, 0.95, np.float32)
    frames[781:797] = 0.01
    first, *_ = run(frames, CutOptions(speech_pad_ms=0))
    assert 781 * FRAME_SAMPLES <= first.span.end_samples <= 797 * FRAME_SAMPLES


def test_speech_without_a_pause_is_cut_where_the_detector_is_least_sure() -> None:
    """Without any pause the cut is at the frames with the lowest probability in the last third."""
    frames = np.full(1500, 0.95, np.float32)
    frames[800:803] = 0.6
    first, *_ = run(frames, CutOptions())
    assert 800 * FRAME_SAMPLES <= first.span.end_samples <= 803 * FRAME_SAMPLES


def test_silence_gives_no_window() -> None:
    """Ten minutes of silence are skipped as a whole."""
    assert run(np.full(18_750, 0.03, np.float32), CutOptions()) == []


@pytest.mark.parametrize("n_samples", [1, 1600, 511, 512, 513])
def test_a_last_word_shorter_than_a_frame_is_kept(n_samples: int) -> None:
    """A window of audio shorter than a frame, or a little longer, ends exactly where the audio ends."""
    n_frames = -(-n_samples // FRAME_SAMPLES)
    cutter = Cutter(CutOptions())
    cuts = cutter.feed(np.full(n_frames, 0.9, np.float32)) + cutter.finish(n_samples)
    assert [cut.span for cut in cuts] == [(0, n_samples)]


def test_hysteresis_keeps_a_wavering_voice_together() -> None:
    """A dip above threshold - 0.15 does not end speech, a deeper one does, and short pauses are bridged."""
    frames = np.array([0.1, 0.6, 0.4, 0.6, 0.2, 0.7, 0.1], np.float32)
    assert speech_runs(frames, 0.5) == [(1, 4), (5, 6)]
    assert join_runs([(1, 4), (5, 6)], min_gap_frames=2) == [(1, 6)]


def test_nothing_behind_the_end_of_the_audio() -> None:
    """A last frame that holds no sample of the audio makes no window and no speech."""
    frames = np.full(40, 0.9, np.float32)
    cutter = Cutter(CutOptions(skip_silence=False))
    cuts = cutter.feed(frames) + cutter.finish(0)
    assert cuts == []
    cutter = Cutter(CutOptions())
    (cut,) = cutter.feed(np.concatenate([frames, np.full(4, 0.02, np.float32), frames])) + cutter.finish(
        41 * FRAME_SAMPLES
    )
    assert (cut.span, cut.speech) == ((0, 41 * FRAME_SAMPLES), ((0, 41 * FRAME_SAMPLES),))
