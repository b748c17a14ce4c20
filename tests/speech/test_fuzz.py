"""Damaged files of every container are decoded or refused, with no other outcome."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.fuzz import fuzz

FILES = 30


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_damaged_files() -> None:
    """No mutation of a file gives samples out of range, an error of another kind or a hanging request."""
    counts = fuzz(FILES, seed=7)
    assert sum(counts.values()) == FILES
    assert set(counts) <= {"read", "AudioError", "AudioTooLong", "of memory", "CPU time"}
