"""Words and numbers of the store's messages. Pure."""

from __future__ import annotations

MAKE_ROOM = "free some space, or choose another cache_dir"
SHORT_COMMIT_CHARS = 7


def size(size_bytes: int) -> str:
    """A number of bytes for people, in powers of ten as disks and the Hub count."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{size_bytes} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short(commit: str | None) -> str:
    """A commit as people write it."""
    return (commit or "")[:SHORT_COMMIT_CHARS]
