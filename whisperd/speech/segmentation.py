"""Where to cut a stream of audio into windows of at most 30 s. Pure.

Windows are contiguous pieces of the original timeline, so times need no mapping back. They are cut in silence where
there is any, else where the voice detector is least sure; what lies between two windows is silence and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from whisperd.speech.units import FRAME_SAMPLES, SAMPLE_RATE_HZ, WINDOW_SAMPLES, Floats, Span

WINDOW_FRAMES = WINDOW_SAMPLES // FRAME_SAMPLES  # 937, a little under 30 s
HYSTERESIS = 0.15  # speech ends this far below the threshold where it began, as in Silero's own utilities


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOptions:
    """How audio is cut. With ``skip_silence`` False every sample lands in a window; the detector only picks cuts."""

    skip_silence: bool = True
    threshold: float = 0.5
    min_silence_ms: int = 160
    speech_pad_ms: int = 400

    @property
    def min_silence_frames(self) -> int:
        """Shortest pause that counts as a place to cut."""
        return max(1, ms_to_frames(self.min_silence_ms))

    @property
    def pad_frames(self) -> int:
        """Silence kept around speech."""
        return ms_to_frames(self.speech_pad_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One window: where it lies in the audio, and the speech that was heard in it (absolute samples)."""

    span: Span
    speech: tuple[Span, ...]


def ms_to_frames(duration_ms: int) -> int:
    """Milliseconds to whole frames, rounded."""
    return round(duration_ms * SAMPLE_RATE_HZ / 1000 / FRAME_SAMPLES)


def speech_runs(probabilities: Floats, threshold: float) -> list[tuple[int, int]]:
    """Half-open frame ranges of speech: entered at ``threshold``, left below ``threshold - HYSTERESIS``.

    ``probabilities``: float32 [n_frames].
    """
    runs: list[tuple[int, int]] = []
    start: int | None = None
    for index, value in enumerate(probabilities.tolist()):
        if start is None and value >= threshold:
            start = index
        elif start is not None and value < threshold - HYSTERESIS:
            runs.append((start, index))
            start = None
    if start is not None:
        runs.append((start, len(probabilities)))
    return runs


def join_runs(runs: list[tuple[int, int]], min_gap_frames: int) -> list[tuple[int, int]]:
    """Runs with pauses shorter than ``min_gap_frames`` made one."""
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if joined and start - joined[-1][1] < min_gap_frames:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def cut_frame(probabilities: Floats, options: CutOptions) -> int:
    """The frame at which a full window is cut, in (0, len(probabilities)].

    The longest pause in the last third, else the longest pause after the first third, else the frame with the least
    speech (over a tenth of a second) in the last third. ``probabilities``: float32 [WINDOW_FRAMES].
    """
    n_frames = len(probabilities)
    runs = join_runs(speech_runs(probabilities, options.threshold), options.min_silence_frames)
    pauses = list(zip([end for _, end in runs[:-1]], [start for start, _ in runs[1:]], strict=True))
    if runs and n_frames - runs[-1][1] >= options.min_silence_frames:
        pauses.append((runs[-1][1], n_frames))
    for earliest in (2 * n_frames // 3, n_frames // 3):
        late = [(end - start, start, end) for start, end in pauses if start >= earliest]
        if late:
            _, start, end = max(late)
            return (start + end + 1) // 2
    tail = np.convolve(probabilities[2 * n_frames // 3 :], np.full(3, 1 / 3, np.float32), mode="same")
    return 2 * n_frames // 3 + max(1, int(np.argmin(tail)))


class Cutter:
    """Turns a stream of voice probabilities into cuts, as early as they are certain.

    ``feed`` frames in order, then ``finish`` once with the exact length. Samples before ``needed_from_samples`` will
    not be part of any further cut.
    """

    def __init__(self, options: CutOptions) -> None:
        self._options = options
        self._frames: Floats = np.zeros(0, np.float32)
        self._first_frame = 0  # absolute index of _frames[0]: nothing before it is in a further window

    @property
    def needed_from_samples(self) -> int:
        """First sample that may still be asked for."""
        return self._first_frame * FRAME_SAMPLES

    def feed(self, probabilities: Floats) -> list[Cut]:
        """Takes the next frames, float32 [k]; returns the windows that are now certain."""
        self._frames = np.concatenate([self._frames, probabilities])
        cuts: list[Cut] = []
        self._skip_silence()
        while len(self._frames) > WINDOW_FRAMES:
            cuts.extend(self._emit(cut_frame(self._frames[:WINDOW_FRAMES], self._options)))
            self._skip_silence()
        return cuts

    def finish(self, total_samples: int) -> list[Cut]:
        """The windows that remain; ``total_samples`` clips the last frame, which may be padded."""
        cuts = self.feed(np.zeros(0, np.float32))
        if len(self._frames):
            cuts.extend(self._emit(len(self._frames)))
        return list(_clip(cuts, total_samples))

    def _skip_silence(self) -> None:
        if not self._options.skip_silence:
            return
        voiced = np.flatnonzero(self._frames >= self._options.threshold)
        first = int(voiced[0]) if len(voiced) else len(self._frames)
        self._drop(max(0, first - self._options.pad_frames))

    def _emit(self, n_frames: int) -> Iterator[Cut]:
        options = self._options
        runs = join_runs(speech_runs(self._frames[:n_frames], options.threshold), options.min_silence_frames)
        end = n_frames
        if options.skip_silence:
            end = min(n_frames, runs[-1][1] + options.pad_frames) if runs else 0
        if end:
            base = self._first_frame
            yield Cut(
                span=_span(base, base + end), speech=tuple(_span(base + start, base + stop) for start, stop in runs)
            )
        self._drop(n_frames)

    def _drop(self, n_frames: int) -> None:
        self._frames = self._frames[n_frames:]
        self._first_frame += n_frames


def _span(start_frame: int, end_frame: int) -> Span:
    return Span(start_frame * FRAME_SAMPLES, end_frame * FRAME_SAMPLES)


def _clip(cuts: list[Cut], total_samples: int) -> Iterator[Cut]:
    for cut in cuts:
        span = Span(cut.span.start_samples, min(cut.span.end_samples, total_samples))
        if span.start_samples < span.end_samples:
            speech = tuple(Span(start, min(end, total_samples)) for start, end in cut.speech if start < total_samples)
            yield Cut(span=span, speech=speech)
