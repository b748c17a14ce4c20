"""The layout of a Hugging Face cache, and the files of whisperd beside it. All I/O on the cache happens here.

<cache>/models--owner--name/blobs/<hash>            sha256 (LFS) or git-sha1, as the Hub declares it
                           /snapshots/<commit>/<path> -> ../../blobs/<hash>
                           /refs/<branch>           40 hex digits, no newline
<cache>/whisperd.lock                               what was resolved: the record
<cache>/.whisperd/{lock,stamps.json,staging/}       one writer; what was verified; what is being fetched
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from whisperd.errors import CacheBusy, DiskFull, StoreError
from whisperd.hub.failures import disk_error
from whisperd.plan import FileState, RemoteFile
from whisperd.sources import COMMIT, HubSource

OWN_DIR = ".whisperd"
SHA256_DIGITS = 64
CHUNK_BYTES = 1 << 20
MARGIN_BYTES = 64 << 20  # left free on the disk: the lock file, stamps, and whoever else writes there
INODES_MIN = 100
PIN_CHARS = 12


class Stamp(NamedTuple):
    """What a verified blob looked like; while it does, its content is taken to be the same."""

    size_bytes: int
    mtime_ns: int
    inode: int


class Repo:
    """One repository inside a cache."""

    def __init__(self, cache_dir: Path, repo_id: str) -> None:
        self.path = cache_dir / f"models--{repo_id.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """The directory of a commit."""
        return self.path / "snapshots" / commit

    def blob(self, file: RemoteFile) -> Path:
        """Where the bytes of a file are."""
        return self.path / "blobs" / file.hash

    def ref(self, source: HubSource) -> Path:
        """The ref that other tools follow; a pinned commit gets one too, or their cleaning would take it."""
        name = f"whisperd/{source.revision[:PIN_CHARS]}" if source.is_pinned else source.revision
        return self.path / "refs" / name

    def commit_of(self, source: HubSource) -> str | None:
        """The commit that the cache holds for a revision, by its ref."""
        if source.is_pinned:
            return source.revision if self.snapshot(source.revision).is_dir() else None
        with suppress(OSError, UnicodeDecodeError):
            text = self.ref(source).read_text(encoding="ascii")
            return text if COMMIT.fullmatch(text) else None
        return None

    def listed(self, commit: str) -> tuple[RemoteFile, ...]:
        """The files of a snapshot that link to blobs, as their links and sizes declare them."""
        found = []
        with suppress(OSError):
            for entry in sorted(self.snapshot(commit).iterdir()):
                if entry.is_symlink() and entry.is_file():
                    name = entry.readlink().name
                    found.append(RemoteFile(path=entry.name, size_bytes=entry.stat().st_size, hash=name))
        return tuple(found)

    def link(self, commit: str, file: RemoteFile) -> None:
        """Makes the snapshot lead to the blob; whatever was there is replaced at once."""
        entry = self.snapshot(commit) / file.path
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = entry.with_name(f".{entry.name}.whisperd")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(os.path.relpath(self.blob(file), entry.parent))
        scratch.replace(entry)

    def write_ref(self, source: HubSource, commit: str) -> None:
        """Other tools see the new commit from now on."""
        write_atomically(self.ref(source), commit)


def git_or_sha256(path: Path, expected: str) -> str:
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
            return self._content(blob, file) if blob.is_file() else "missing"
        if entry.exists():
            return "not_a_link"
        return "unlinked" if blob.is_file() and self._content(blob, file) == "ok" else "missing"

    def _content(self, path: Path, file: RemoteFile) -> FileState:
        stamp = stamp_of(path)
        if stamp.size_bytes != file.size_bytes:
            return "wrong_size"
        if not self._verify and self.stamps.get(str(path)) == stamp:
            return "ok"
        if git_or_sha256(path, file.hash) != file.hash:
            self.stamps.pop(str(path), None)
            return "wrong_hash"
        self.stamps[str(path)] = stamp
        return "ok"


def write_atomically(path: Path, text: str) -> None:
    """The old file or the new one, never half, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    scratch = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Read without changing it: this is no single-threaded program."""
    with suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def free_bytes(cache_dir: Path) -> int | None:
    """Room on the disk of a directory that may not exist yet."""
    existing = next((path for path in (cache_dir, *cache_dir.parents) if path.is_dir()), None)
    if existing is None:
        return None
    found = os.statvfs(existing)
    return found.f_bavail * found.f_frsize


def preflight(cache_dir: Path) -> None:
    """Refuses a cache that cannot take a model, before the first byte; raises StoreError."""
    own = cache_dir / OWN_DIR
    try:
        own.mkdir(parents=True, exist_ok=True)
        found = os.statvfs(own)
        if found.f_files and found.f_favail < INODES_MIN:
            raise DiskFull(
                f"{cache_dir}: only {found.f_favail} inodes are free; free some, or choose another cache_dir"
            )
        with tempfile.TemporaryDirectory(dir=own, prefix="probe-") as probe:
            (Path(probe) / "link").symlink_to("nowhere")
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EOPNOTSUPP} and own.is_dir() and os.access(own, os.W_OK):
            raise StoreError(f"{cache_dir}: this file system has no symbolic links, which the cache needs") from error
        raise disk_error(error, cache_dir) from error


@contextmanager
def one_writer(cache_dir: Path) -> Iterator[None]:
    """Holds the lock on the cache; raises CacheBusy with the process that has it."""
    path = cache_dir / OWN_DIR / "lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            raise CacheBusy(
                f"another reconcile (pid {holder}) works on {cache_dir}; try again when it is done"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def staging_dir(cache_dir: Path) -> Path:
    """Where downloads land: a cache of its own on the same disk, so that nothing unverified is ever seen."""
    return cache_dir / OWN_DIR / "staging"


def clear_staging(cache_dir: Path) -> None:
    """Removes what a killed download left behind. Only with the lock."""
    shutil.rmtree(staging_dir(cache_dir), ignore_errors=True)


def install(staged: Path, repo: Repo, file: RemoteFile) -> None:
    """Moves verified bytes into the cache. An engine that has the old file open keeps it."""
    target = repo.blob(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("rb") as data:
            os.fsync(data.fileno())
        staged.replace(target)
    except OSError as error:
        raise disk_error(error, target) from error
