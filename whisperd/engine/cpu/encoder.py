"""Windows to encoder states, one window at a time, and a cache of the states of windows that may be decoded again.

On a CPU a batch is no faster to encode, and needs 400 MB more (tiny.en, two batches of 8). A window that fails a
safeguard is decoded again at another temperature with the same states; encoding is more than half of the work on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.base import Window
from whisperd.engine.cpu.unpadded import FRAMES_PER_S, STATES, frames_of, joined, quiet_samples
from whisperd.speech.features import CHUNK_FRAMES, LogMel
from whisperd.speech.units import Floats

if TYPE_CHECKING:
    import ctranslate2


import threading
from collections import OrderedDict

Encode = Callable[[NDArray[np.float32]], Floats]
"""Log-mel float32 [n_mels, frames] to float32 [1, frames / 2, d_model]; raises RuntimeError or MemoryError."""


class WindowEncoder:
    """Samples to states; may be used by several workers at the same time.

    Args:
        encode: the encoder.
        n_mels: what it reads.
        kept: number of windows whose states are cached.
    """

    def __init__(self, encode: Encode, n_mels: int, *, kept: int = 0) -> None:
        self._encode = encode
        self._n_mels = n_mels
        self._log_mel = LogMel(n_mels)
        self._quiet: Floats | None = None
        self._kept = EncoderCache(kept)

    @cached_property
    def width(self) -> int:
        """d_model."""
        return int(self._encode(np.zeros((self._n_mels, FRAMES_PER_S), np.float32)).shape[-1])

    def whole(self, window: Window) -> Floats:
        """float32 [1, 1500, d_model]: padded with silence to 30 s."""
        return self._of(window, CHUNK_FRAMES)

    def short(self, window: Window) -> Floats:
        """float32 [1, up to 1500, d_model]: the audio and a margin; ``together`` appends the states of silence."""
        return self._of(window, frames_of(window))

    def together(self, rows: Sequence[Floats]) -> Floats:
        """Windows of any lengths as one batch, float32 [n, up to 1500, d_model]."""
        whole = all(row.shape[1] == STATES for row in rows)
        return np.concatenate(rows) if whole else joined(rows, self._quiet_states())

    def _of(self, window: Window, n_frames: int) -> Floats:
        found = self._kept.get(window.audio, n_frames)
        if found is None:
            found = self._encode(self._log_mel(window.samples)[:, :n_frames])
            self._kept.put(window.audio, n_frames, found)
        return found

    def _quiet_states(self) -> Floats:
        if self._quiet is None:  # two workers may compute it at once: both get the same states
            self._quiet = self._encode(self._log_mel(quiet_samples()))
        return self._quiet


def ctranslate2_encoder(model: ctranslate2.models.Whisper) -> Encode:
    """CTranslate2's own encoder, which needs no other package."""
    import ctranslate2

    def encode(features: NDArray[np.float32]) -> Floats:
        states = model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(features[None])))
        return np.asarray(states.to(ctranslate2.DataType.float32))

    return encode


class EncoderCache:
    """The encoder states of the last ``most`` pieces of audio, oldest first; safe to use from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._states: OrderedDict[tuple[int, int], Floats] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, audio: int | None, n_frames: int) -> Floats | None:
        """The states of this audio at this length, if they are still cached."""
        with self._lock:
            return None if audio is None else self._states.get((audio, n_frames))

    def put(self, audio: int | None, n_frames: int, states: Floats) -> None:
        """Stores states, and drops the oldest; audio that is decoded once (None) is not stored."""
        if audio is None:
            return
        with self._lock:
            self._states[audio, n_frames] = states
            while len(self._states) > self._most:
                self._states.popitem(last=False)
