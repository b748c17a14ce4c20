"""Audio as a stream of windows: a bounded number of samples is in memory, however long the file is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from whisperd.speech.segmentation import Cut, CutOptions, Cutter
from whisperd.speech.units import Samples, Span
from whisperd.speech.vad import Level, SpeechNetwork, SpeechStream


class SampleBuffer:
    """The stretch of audio that may still be read, float32 16 kHz."""

    def __init__(self) -> None:
        self._blocks: deque[tuple[int, Samples]] = deque()
        self.end_samples = 0

    def append(self, block: Samples) -> None:
        """Adds the next block, float32 [n]."""
        self._blocks.append((self.end_samples, block))
        self.end_samples += len(block)

    def copy(self, span: Span) -> Samples:
        """The samples of ``span``, which must not have been dropped; float32 [span length]."""
        start, end = span
        parts = [
            block[max(0, start - at) : end - at] for at, block in self._blocks if at < end and at + len(block) > start
        ]
        return np.concatenate(parts)

    def drop_before(self, position_samples: int) -> None:
        """Removes whole blocks that end before this sample."""
        while self._blocks and self._blocks[0][0] + len(self._blocks[0][1]) <= position_samples:
            self._blocks.popleft()


def cuts(
    blocks: Iterable[Samples], buffer: SampleBuffer, detector: SpeechNetwork, options: CutOptions
) -> Iterator[Cut]:
    """Where to cut the audio into windows, in order; the samples of a cut are in ``buffer`` until the next one.

    ``blocks`` are float32 [n], mono 16 kHz.
    """
    stream, cutter, level = SpeechStream(detector), Cutter(options), Level()
    for block in blocks:
        buffer.append(block)
        yield from cutter.feed(stream.feed(level.amplify(block)))
        buffer.drop_before(cutter.needed_from_samples)
    yield from cutter.feed(stream.finish())
    yield from cutter.finish(buffer.end_samples)
