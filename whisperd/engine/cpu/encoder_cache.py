"""The encoder states of windows that may come again.

A window that fails a safeguard is decoded again at another temperature, and its states are the same. Encoding is more
than half of the work on a CPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from whisperd.speech.units import Floats


class Kept:
    """The states of the last few pieces of audio, oldest first; safe to use from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._states: OrderedDict[tuple[int, int], Floats] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, audio: int | None, n_frames: int) -> Floats | None:
        """What was put for so many frames of this audio, if it is still there."""
        with self._lock:
            return None if audio is None else self._states.get((audio, n_frames))

    def put(self, audio: int | None, n_frames: int, states: Floats) -> None:
        """Keeps states in place of the oldest ones; audio that never comes again is not kept."""
        if audio is None:
            return
        with self._lock:
            self._states[audio, n_frames] = states
            while len(self._states) > self._most:
                self._states.popitem(last=False)
