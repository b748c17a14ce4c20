"""What models cost in memory, and how the process gives it back."""

from __future__ import annotations

import ctypes
from pathlib import Path

WEIGHTS = ("model.bin", "*.safetensors")


def trim() -> None:
    """Returns what was freed to the system, which glibc otherwise keeps for later. Elsewhere it does nothing."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class Leftovers:
    """Whether served requests have left something behind that nobody needs: freed memory that glibc keeps."""

    def __init__(self) -> None:
        self._n_cleared = 0

    def due(self, *, n_served: int, n_active: int) -> bool:
        """Whether to ``trim`` now: requests were served since the last time, and none is there that would be slowed."""
        if n_active or n_served == self._n_cleared:
            return False
        self._n_cleared = n_served
        return True


def weights_bytes(snapshot: Path) -> int:
    """Size of a model's weights on disk, which is what the budget counts.

    What a process grows by cannot be told apart from everything else that it does meanwhile; the file is the same each
    time, and on the CPU int8 weights and a batch together are seldom more.
    """
    return sum(path.stat().st_size for pattern in WEIGHTS for path in snapshot.glob(pattern))
