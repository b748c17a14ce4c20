"""Whether the bytes of a file are the declared ones: hashes, and stamps of the files that were hashed before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from whisperd.files import write_atomically
from whisperd.store.cache import OWN_DIR, Repo
from whisperd.store.plan import FileState, RemoteFile

SHA256_DIGITS = 64
CHUNK_BYTES = 1 << 20
STAMPS_FILE = f"{OWN_DIR}/stamps.json"


class Stamp(NamedTuple):
    """What a verified blob looked like; while it does, its content is taken to be the same."""

    size_bytes: int
    mtime_ns: int
    inode: int


def hash_of(path: Path, expected: str) -> str:
    """The hash of a file, of the kind that ``expected`` is."""
    digest = hashlib.sha256() if len(expected) == SHA256_DIGITS else hashlib.sha1(usedforsecurity=False)
    if len(expected) != SHA256_DIGITS:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def stamp_of(path: Path) -> Stamp:
    """What a file looks like now."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


class Inspector:
    """Looks at files; remembers which were verified.

    Args:
        stamps: what is known to be verified, by path; new findings are added.
        verify: hash every file again.
    """

    def __init__(self, stamps: dict[str, Stamp], *, verify: bool = False) -> None:
        self.stamps = stamps
        self._verify = verify

    def state(self, repo: Repo, commit: str, file: RemoteFile) -> FileState:
        """How one file of a snapshot is; never the network."""
        entry, blob = repo.snapshot(commit) / file.path, repo.blob(file)
        if entry.is_symlink():
            if entry.readlink().name != file.hash:
                return "wrong_hash"
            return self.content(blob, file) if blob.is_file() else "missing"
        if entry.exists():
            return "not_a_link"
        return "unlinked" if blob.is_file() and self.content(blob, file) == "ok" else "missing"

    def content(self, path: Path, file: RemoteFile) -> FileState:
        """How the bytes of a file that is there are."""
        stamp = stamp_of(path)
        if stamp.size_bytes != file.size_bytes:
            return "wrong_size"
        if not self._verify and self.stamps.get(str(path)) == stamp:
            return "ok"
        if hash_of(path, file.hash) != file.hash:
            self.stamps.pop(str(path), None)
            return "wrong_hash"
        self.stamps[str(path)] = stamp
        return "ok"


def read_stamps(cache_dir: Path) -> dict[str, Stamp]:
    """What was verified; nothing where it cannot be read: then it is verified again."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        stamps = json.loads((cache_dir / STAMPS_FILE).read_text(encoding="utf-8"))
        return {path: Stamp(*values) for path, values in stamps.items()}
    return {}


def write_stamps(cache_dir: Path, stamps: Mapping[str, Stamp]) -> None:
    """A cache that cannot be written to is verified again next time."""
    with suppress(OSError):
        write_atomically(cache_dir / STAMPS_FILE, json.dumps(stamps))
