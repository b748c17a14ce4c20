"""Whether the bytes of a file are the declared ones: hashes, and stamps of the files that were hashed before."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from whisperd.store.cache import OWN_DIR, Repo, replace_text
from whisperd.store.plan import FileState, RemoteFile, Resolved
from whisperd.store.schema import read_bounded, read_stamps_json

SHA256_DIGITS = 64
CHUNK_BYTES = 1 << 20
STAMPS_FILE = f"{OWN_DIR}/stamps.json"


class Stamp(NamedTuple):
    """What a verified file looked like; while it does, its content is taken to be the same."""

    size_bytes: int
    mtime_ns: int
    inode: int


def hash_of(path: Path, expected: str) -> str:
    """The hash of a file, of the kind that ``expected`` is: sha256, or the sha1 of a git blob."""
    digest = hashlib.sha256() if len(expected) == SHA256_DIGITS else hashlib.sha1(usedforsecurity=False)
    if len(expected) != SHA256_DIGITS:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def stamp_of(path: Path) -> Stamp | None:
    """What a regular file, or the one that a link leads to, looks like now; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


class Inspector:
    """Looks at files; remembers which were verified. Threads may share one.

    Args:
        stamps: what is known to be verified, by path; new findings are added.
        verify: hash every file again, once.
    """

    def __init__(self, stamps: dict[str, Stamp], *, verify: bool = False) -> None:
        self.stamps = stamps
        self._verify = verify
        self._hashed: set[str] = set()
        self._lock = threading.RLock()  # hashing is bound by the disk: one file at a time is as fast

    def state(self, repo: Repo, commit: str, file: RemoteFile) -> FileState:
        """The state of one file of a snapshot: whether its entry leads to the declared bytes. No network."""
        entry, blob = repo.entry(commit, file.path), repo.blob(file)
        if entry.exists() and not entry.is_symlink():
            return "not_a_link"
        content: FileState = "missing" if stamp_of(blob) is None else self.content(blob, file)
        if repo.leads_to_blob(commit, file):
            return content
        if content == "ok":
            return "wrong_link" if entry.is_symlink() else "unlinked"
        return content if entry.is_symlink() else "missing"

    def is_whole(self, repo: Repo, target: Resolved) -> bool:
        """True if every file of the commit is there, and leads to the declared bytes."""
        return all(self.state(repo, target.commit, file) == "ok" for file in target.files)

    def content(self, path: Path, file: RemoteFile) -> FileState:
        """The state of the content of a regular file."""
        with self._lock:
            stamp = stamp_of(path)
            if stamp is None:
                return "missing"
            if stamp.size_bytes != file.size_bytes:
                return "wrong_size"
            if self.stamps.get(str(path)) == stamp and (not self._verify or str(path) in self._hashed):
                return "ok"
            try:
                is_right = hash_of(path, file.hash) == file.hash
            except OSError:
                is_right = False  # a disk that cannot read it
            if not is_right:
                self.stamps.pop(str(path), None)
                return "wrong_hash"
            self._learn(path, stamp)
        return "ok"

    def learn(self, path: Path) -> None:
        """Remembers that a file was verified just now."""
        with self._lock:
            if (stamp := stamp_of(path)) is not None:
                self._learn(path, stamp)

    def _learn(self, path: Path, stamp: Stamp) -> None:
        self.stamps[str(path)] = stamp
        self._hashed.add(str(path))


def read_stamps(cache_dir: Path) -> dict[str, Stamp]:
    """What was verified; nothing where it cannot be read: then it is verified again."""
    with suppress(OSError, ValueError):
        found = read_stamps_json(read_bounded(cache_dir / STAMPS_FILE))
        return {path: Stamp(*values) for path, values in found.items()}
    return {}


def write_stamps(cache_dir: Path, stamps: Mapping[str, Stamp]) -> None:
    """Keeps what was verified. Where that cannot be, or the cache is another user's, it is verified again next time."""
    with suppress(OSError):
        if cache_dir.stat().st_uid == os.geteuid():
            replace_text(cache_dir / STAMPS_FILE, json.dumps(stamps), cache_dir / OWN_DIR)
