"""Waiting for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0
POLL_S = 0.005


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> float:
    """Polls until the condition is true; returns how long that took, in seconds, and fails after ``patience_s``."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < patience_s, f"it did not become true in {patience_s:g} s"
        time.sleep(POLL_S)
    return time.monotonic() - started_s
