"""Windows to encoder states on CTranslate2, and the states of windows that may come again.

A window that fails a safeguard is decoded again at another temperature, and its states are the same. Encoding is more
than half of the work on a CPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from whisperd.engine.base import Window
from whisperd.engine.short import States, frames_of, joined, quiet_samples
from whisperd.features import CHUNK_FRAMES, LogMel

if TYPE_CHECKING:
    import ctranslate2


class Kept:
    """The states of the last few pieces of audio, oldest first; safe to use from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._states: OrderedDict[tuple[int, int], States] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, audio: int | None, n_frames: int) -> States | None:
        """What was put for so many frames of this audio, if it is still there."""
        with self._lock:
            return None if audio is None else self._states.get((audio, n_frames))

    def put(self, audio: int | None, n_frames: int, states: States) -> None:
        """Keeps states in place of the oldest ones; audio that never comes again is not kept."""
        if audio is None:
            return
        with self._lock:
            self._states[audio, n_frames] = states
            while len(self._states) > self._most:
                self._states.popitem(last=False)


class Encoder:
    """Windows to encoder states, float32 [n, up to 1500, d_model].

    One window at a time: on a CPU a batch is no faster to encode, and needs 400 MB more (tiny.en, two batches of 8).

    Args:
        model: used by several threads at the same time.
        kept: of so many windows the states are remembered.
    """

    def __init__(self, model: ctranslate2.models.Whisper, *, kept: int) -> None:
        self._model = model
        self._log_mel = LogMel(model.n_mels)
        self._quiet: States | None = None
        self._kept = Kept(kept)

    def whole(self, batch: Sequence[Window]) -> ctranslate2.StorageView:
        """Each padded with silence to 30 s."""
        return self._joined([self._of(window, CHUNK_FRAMES) for window in batch])

    def short(self, batch: Sequence[Window]) -> ctranslate2.StorageView:
        """Each as long as it has to be, and the end of a quiet window behind it."""
        if self._quiet is None:  # several workers may find it missing: they compute the same
            quiet = Window(id=0, samples=quiet_samples(), request=batch[0].request)
            self._quiet = self._of(quiet, CHUNK_FRAMES)
        rows = [self._of(window, frames_of(window)) for window in batch]
        return self._joined([joined(rows, self._quiet)])

    def _joined(self, rows: Sequence[States]) -> ctranslate2.StorageView:
        import ctranslate2

        return ctranslate2.StorageView.from_array(np.concatenate(rows))

    def _of(self, window: Window, n_frames: int) -> States:
        """float32 [1, n_frames / 2, d_model]."""
        found = self._kept.get(window.audio, n_frames)
        if found is None:
            found = self._states(self._log_mel(window.samples)[:, :n_frames])
            self._kept.put(window.audio, n_frames, found)
        return found

    def _states(self, features: States) -> States:
        """float32 [n_mels, frames] to float32 [1, frames / 2, d_model]."""
        import ctranslate2

        view = ctranslate2.StorageView.from_array(np.ascontiguousarray(features[None]))
        return as_array(self._model.encode(view))


def as_array(states: ctranslate2.StorageView) -> States:
    """float32, whatever the model computes with."""
    import ctranslate2

    return np.asarray(states.to(ctranslate2.DataType.float32))
