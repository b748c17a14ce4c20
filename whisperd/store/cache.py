"""The layout of a Hugging Face cache, and the files of whisperd beside it. All I/O on the cache happens here.

<cache>/models--owner--name/blobs/<hash>            sha256 (LFS) or git-sha1, as the Hub declares it
                           /snapshots/<commit>/<path> -> ../../blobs/<hash>
                           /refs/<branch>           40 hex digits, no newline
<cache>/whisperd.lock                               what was resolved: the record
<cache>/.whisperd/lock                              one writer
                 /stamps.json                       what was verified
                 /staging/models--owner--name/<hash>   what is being fetched, or was when the power went
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from whisperd.errors import SourceError
from whisperd.files import write_atomically
from whisperd.reference import COMMIT, HubSource
from whisperd.store.hub.failures import disk_error
from whisperd.store.plan import RemoteFile, Removal, RepoContents, select_files

OWN_DIR = ".whisperd"
PIN_CHARS = 12


class Repo:
    """One repository inside a cache."""

    def __init__(self, cache_dir: Path, repo_id: str) -> None:
        self.id = repo_id
        self.path = cache_dir / folder(repo_id)

    def snapshot(self, commit: str) -> Path:
        """The directory of a commit."""
        return self.path / "snapshots" / commit

    def blob(self, file: RemoteFile) -> Path:
        """Where the bytes of a file are."""
        return self.path / "blobs" / file.hash

    @staticmethod
    def ref_name(source: HubSource) -> str:
        """The ref that other tools follow; a pinned commit gets one too, or their cleaning would take it."""
        return f"whisperd/{source.revision[:PIN_CHARS]}" if source.is_pinned else source.revision

    def commit_of(self, source: HubSource) -> str | None:
        """The commit that the cache holds for a revision, by its ref."""
        if source.is_pinned:
            return source.revision if self.snapshot(source.revision).is_dir() else None
        return self._named(self.ref_name(source))

    def has_ref(self, source: HubSource, commit: str) -> bool:
        """Whether other tools that follow the revision find something: this commit, or one that they have moved to."""
        named = self._named(self.ref_name(source))
        return named is not None and (named == commit or self._is_whole(named))

    def _is_whole(self, commit: str) -> bool:
        """Whether a snapshot, which another tool may have left half done, holds a model."""
        with suppress(SourceError):
            return bool(select_files(self.listed(commit)))
        return False

    def _named(self, ref: str) -> str | None:
        with suppress(OSError, UnicodeDecodeError):
            text = (self.path / "refs" / ref).read_text(encoding="ascii")
            return text if COMMIT.fullmatch(text) else None
        return None

    def contents(self, owned: frozenset[str]) -> RepoContents:
        """Everything that lies in it; ``owned`` are the commits that whisperd has fetched."""
        commits = [entry.name for entry in _entries(self.path / "snapshots")]
        refs = [path for path in (self.path / "refs").rglob("*") if path.is_file()]
        return RepoContents(
            repo=self.id,
            snapshots={commit: frozenset(_links(self.snapshot(commit))) for commit in commits},
            refs={
                str(path.relative_to(self.path / "refs")): path.read_text(encoding="utf-8", errors="replace")
                for path in refs
            },
            blob_bytes={entry.name: entry.stat().st_size for entry in _entries(self.path / "blobs") if entry.is_file()},
            owned=owned,
            in_use=frozenset(commit for commit in owned if is_held(self.snapshot(commit))),
        )

    def remove(self, removal: Removal) -> None:
        """Refs first: whoever looks meanwhile finds no branch rather than half a snapshot."""
        for name in removal.refs:
            if self._named(name) == removal.commit:  # an update may have moved it since
                (self.path / "refs" / name).unlink()
        shutil.rmtree(self.snapshot(removal.commit))
        for name in removal.blobs:
            (self.path / "blobs" / name).unlink(missing_ok=True)
        (self.path / "trees" / f"{removal.commit}.json").unlink(missing_ok=True)
        if not _entries(self.path / "snapshots") and not _entries(self.path / "blobs"):
            shutil.rmtree(self.path)

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
        path = self.path / "refs" / self.ref_name(source)
        if path.is_dir():  # nobody could ever read or replace it
            shutil.rmtree(path)
        write_atomically(path, commit)


def folder(repo_id: str) -> str:
    """The directory of a repository inside a cache."""
    return f"models--{repo_id.replace('/', '--')}"


def used_bytes(cache_dir: Path) -> int:
    """Bytes of all blobs of the cache, whoever has fetched them."""
    return sum(entry.stat().st_size for entry in cache_dir.glob("models--*/blobs/*") if entry.is_file())


def hold(snapshot: Path) -> int | None:
    """Marks a snapshot as in use until the returned descriptor is closed or this process ends; None if it is gone.

    The lock of the kernel on the directory, which leaves nothing behind.
    """
    with suppress(OSError):
        handle = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_SH)
        return handle
    return None


def is_held(snapshot: Path) -> bool:
    """Whether some process has marked it."""
    try:
        handle = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _entries(directory: Path) -> list[Path]:
    with suppress(OSError):
        return list(directory.iterdir())
    return []


def _links(snapshot: Path) -> Iterator[str]:
    """The blobs that a snapshot leads to, in all its directories."""
    for path in snapshot.rglob("*"):
        if path.is_symlink():
            yield path.readlink().name


def install(part: Path, repo: Repo, file: RemoteFile) -> None:
    """Moves verified bytes into the cache. An engine that has the old file open keeps it."""
    target = repo.blob(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as data:
            os.fsync(data.fileno())
        part.replace(target)
    except OSError as error:
        raise disk_error(error, target) from error


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
