"""What is being fetched: parts on the same disk as the cache, where no other tool looks.

A part has the name of the hash that its bytes must have in the end, so that it can be finished later by whoever wants
the same file, and can never be taken for another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from whisperd.store.cache import OWN_DIR, folder
from whisperd.store.plan import RemoteFile


class Staging:
    """The parts of one repository."""

    def __init__(self, cache_dir: Path, repo_id: str) -> None:
        self.path = staging_dir(cache_dir) / folder(repo_id)

    def part(self, file: RemoteFile) -> Path:
        """Where the bytes of a file arrive."""
        return self.path / file.hash

    def size_bytes(self, file: RemoteFile) -> int:
        """How much of a file is there."""
        with suppress(OSError):
            return self.part(file).stat().st_size
        return 0


def staging_dir(cache_dir: Path) -> Path:
    """The parts of all repositories."""
    return cache_dir / OWN_DIR / "staging"


def clear_staging(cache_dir: Path, keep: Collection[Path]) -> None:
    """Removes all parts but those that are still wanted. Only with the lock on the cache."""
    root = staging_dir(cache_dir)
    if not keep:
        shutil.rmtree(root, ignore_errors=True)
        return
    for part in [path for path in root.rglob("*") if path.is_file() and path not in keep]:
        part.unlink(missing_ok=True)
