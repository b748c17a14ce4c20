"""How much memory models take, and how the process returns it to the system."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

WEIGHTS = ("model.bin", "*.safetensors")


def trim() -> None:
    """Returns freed memory to the system, which glibc keeps otherwise.

    An error and the frames that it came through hold each other, with all the audio of a request that was cancelled;
    an idle process collects such cycles only when it is asked to. Without glibc the rest is left as it is.
    """
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class Leftovers:
    """Whether requests were served since the last ``trim``, so that glibc holds memory which they have freed."""

    def __init__(self) -> None:
        self._n_cleared = 0

    def due(self, *, n_served: int, n_active: int) -> bool:
        """Whether to ``trim`` now: requests were served since the last time, and none runs that would be slowed."""
        if n_active or n_served == self._n_cleared:
            return False
        self._n_cleared = n_served
        return True


def weights_bytes(snapshot: Path) -> int:
    """Size of a model's weights on disk, which is what the budget counts.

    The growth of a process has other causes as well; the file is the same each time, and on the CPU int8 weights and a
    batch together are seldom more.
    """
    return sum(path.stat().st_size for pattern in WEIGHTS for path in snapshot.glob(pattern))
