"""The layout of a Hugging Face cache, and the files of whisperd beside it. All changes of the cache happen here.

<cache>/models--owner--name/blobs/<hash>            sha256 (LFS) or git-sha1, as the Hub declares it
                           /snapshots/<commit>/<path> -> ../../blobs/<hash>
                           /refs/<branch>           40 hex digits, no newline
                           /refs/~whisperd/<commit> keeps what whisperd.lock names from the cleaning of other tools
                           /.whisperd/              scratch files, which a rename moves to their place
<cache>/whisperd.lock                               what was resolved: the record
<cache>/.whisperd/lock                              one writer
                 /stamps.json                       what was verified
                 /staging/models--owner--name/<hash>   what is being fetched, or was when the power went

No tool looks into a directory called .whisperd; what a run that was killed has left there, the next one removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from whisperd.errors import DiskFull, StoreError
from whisperd.files import write_atomically
from whisperd.reference import COMMIT, HubSource
from whisperd.store.hub.failures import disk_error
from whisperd.store.hub.transfer import is_part, part_bytes
from whisperd.store.names import inside
from whisperd.store.plan import RemoteFile, Removal, RepoContents
from whisperd.store.wording import MAKE_ROOM, size

OWN_DIR = ".whisperd"
LOCK_FILE = "whisperd.lock"
# Git allows no branch or tag of such a name.
KEPT_REFS = "~whisperd"
HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
# What tempfile appends, for files that earlier versions made beside their targets.
LEFT_BESIDE = re.compile(r"\..+\.(?:[a-z0-9_]{8}|whisperd)")
REF_BYTES = 4096
PROBE = ".probe.whisperd"


class Repo:
    """One repository inside a cache."""

    def __init__(self, cache_dir: Path, repo_id: str) -> None:
        self.id = repo_id
        self.path = inside(cache_dir, folder(repo_id))
        self.blobs = self.path / "blobs"
        self.scratch = self.path / OWN_DIR

    def snapshot(self, commit: str) -> Path:
        """The directory of a commit."""
        return inside(self.path, "snapshots", commit)

    def entry(self, commit: str, path: str) -> Path:
        """The link of a snapshot with the name of a file."""
        return inside(self.snapshot(commit), *path.split("/"))

    def blob(self, file: RemoteFile) -> Path:
        """Where the bytes of a file are."""
        return inside(self.blobs, file.hash)

    def tree_file(self, commit: str) -> Path:
        """Where huggingface_hub lists all files of a commit."""
        return inside(self.path, "trees", f"{commit}.json")

    def leads_to_blob(self, commit: str, file: RemoteFile) -> bool:
        """True if the entry of the snapshot is a link that ends at the blob of this repository."""
        entry = self.entry(commit, file.path)
        try:
            return entry.is_symlink() and entry.samefile(self.blob(file))
        except OSError:
            return False

    def listed(self, commit: str) -> tuple[RemoteFile, ...]:
        """The files of a snapshot that lead to blobs of this repository, as links and sizes declare them."""
        found = []
        for entry in sorted(_entries(self.snapshot(commit))):
            with suppress(OSError, StoreError):
                name = entry.readlink().name
                file = RemoteFile(path=entry.name, size_bytes=entry.stat().st_size, hash=name)
                if HASH.fullmatch(name) and self.leads_to_blob(commit, file):
                    found.append(file)
        return tuple(found)

    # --- refs

    def commit_of(self, source: HubSource) -> str | None:
        """The commit that the cache holds for a revision, by its ref."""
        if source.is_pinned:
            return source.revision if self.snapshot(source.revision).is_dir() else None
        return self.named(source.revision)

    def named(self, ref: str) -> str | None:
        """The commit that a ref names, None if it names none."""
        with suppress(OSError, UnicodeDecodeError, StoreError):
            path = self._ref(ref)
            if path.is_file():
                with path.open(encoding="ascii") as file:
                    text = file.read(REF_BYTES)
                return text if COMMIT.fullmatch(text) else None
        return None

    def is_kept(self, commit: str) -> bool:
        """True if a ref of whisperd keeps other tools from removing the commit."""
        return self.named(f"{KEPT_REFS}/{commit}") == commit

    def cannot_name(self, source: HubSource) -> bool:
        """True if the branch can have no ref of its own, since another one needs its name as a directory.

        A branch ``v1`` and a tag ``v1/final`` of one repository cannot both be in a cache.
        """
        path = self._ref(source.revision)
        refs = self.path / "refs"
        return any(parent.is_file() for parent in path.parents if refs in parent.parents) or (
            path.is_dir() and any(not one.is_dir() for one in path.rglob("*"))
        )

    def keep(self, commits: Collection[str]) -> None:
        """Lets the refs of whisperd name exactly these commits, as far as they have snapshots."""
        kept = {commit for commit in commits if self.snapshot(commit).is_dir()}
        for path in _entries(inside(self.path, "refs", KEPT_REFS)):
            if path.name not in kept:
                path.unlink(missing_ok=True)
        for commit in kept:
            if not self.is_kept(commit):
                self._write_ref(f"{KEPT_REFS}/{commit}", commit)

    def switch(self, source: HubSource, commit: str) -> None:
        """Lets other tools see the commit from now on; a ref keeps it from their cleaning, also when they move on."""
        if not self.is_kept(commit):
            self._write_ref(f"{KEPT_REFS}/{commit}", commit)
        if not source.is_pinned and not self.cannot_name(source):
            self._write_ref(source.revision, commit)

    def _ref(self, name: str) -> Path:
        return inside(self.path, "refs", *name.split("/"))

    def _write_ref(self, name: str, commit: str) -> None:
        path = self._ref(name)
        if path.is_dir() and not path.is_symlink():  # empty: nobody could ever read or replace it
            shutil.rmtree(path)
        replace_text(path, commit, self.scratch)

    # --- changes

    def link(self, commit: str, file: RemoteFile) -> None:
        """Makes the snapshot lead to the blob; whatever was there is replaced in one step."""
        if self.leads_to_blob(commit, file):
            return
        snapshot, entry = self.snapshot(commit), self.entry(commit, file.path)
        if snapshot.is_symlink():  # its files are somebody else's
            snapshot.unlink()
        entry.parent.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        scratch = inside(self.scratch, "link")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(os.path.relpath(self.blob(file), entry.parent))
        scratch.replace(entry)

    def install(self, part: Path, file: RemoteFile) -> None:
        """Moves verified bytes into the cache. An engine that has the old file open keeps it."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as data:
            os.fsync(data.fileno())
        part.replace(self.blob(file))

    def remove(self, removal: Removal) -> None:
        """Removes a commit. Refs go first: other tools then find no branch rather than half a snapshot."""
        try:
            for name in removal.refs:
                if self.named(name) == removal.commit:  # an update may have moved it since
                    self._ref(name).unlink()
            _remove_tree(self.snapshot(removal.commit))
            for name in removal.blobs:
                inside(self.blobs, name).unlink(missing_ok=True)
            self.tree_file(removal.commit).unlink(missing_ok=True)
            if not _entries(self.path / "snapshots") and not _entries(self.blobs) and not self.path.is_symlink():
                _remove_tree(self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def clean(self) -> None:
        """Removes the scratch files of a run that was killed."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        refs, snapshots = self.path / "refs", self.path / "snapshots"
        left = [self.path / PROBE, self.blobs / PROBE, *refs.rglob(".*"), *snapshots.glob("*/.*")]
        for path in left:
            if LEFT_BESIDE.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
                with suppress(OSError):
                    path.unlink()

    def contents(self, owned: frozenset[str]) -> RepoContents:
        """Everything that lies in it; ``owned`` are the commits that whisperd has fetched."""
        commits = [entry.name for entry in _entries(self.path / "snapshots") if COMMIT.fullmatch(entry.name)]
        names = [str(path.relative_to(self.path / "refs")) for path in (self.path / "refs").rglob("*")]
        return RepoContents(
            repo=self.id,
            snapshots={commit: frozenset(_links(self.snapshot(commit))) for commit in commits},
            refs={name: commit for name in names if (commit := self.named(name)) is not None},
            blob_bytes={entry.name: entry.stat().st_size for entry in _entries(self.blobs) if entry.is_file()},
            owned=owned,
            in_use=frozenset(commit for commit in owned if is_held(self.snapshot(commit))),
        )


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
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError:
            os.close(handle)
            raise
        return handle
    return None


def is_held(snapshot: Path) -> bool:
    """True if some process has marked it, also where the file system has no locks and nobody can know."""
    try:
        handle = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def replace_text(path: Path, text: str, scratch_dir: Path) -> None:
    """Writes a file: the old one is there or the new one, never half, also after a power cut.

    Args:
        path: what is replaced.
        text: the new contents.
        scratch_dir: where the new file is written before it is moved; on the disk of ``path``, or a directory beside
            it is used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = scratch_dir if same_disk(scratch_dir, path.parent) else path.parent
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text, directory)


def same_disk(first: Path, second: Path) -> bool:
    """True if files can be moved from one directory to the other; for directories that do not exist, their parents."""
    return _device(first) == _device(second)


class Staging:
    """What is being fetched of one repository: parts on the disk of its blobs, where no other tool looks.

    A part has the name of the hash that its bytes must have in the end, so that it can be finished later by any run
    that wants the same file, and can never be taken for another one.
    """

    def __init__(self, cache_dir: Path, repo: Repo) -> None:
        self._repo = repo
        usual = inside(staging_dir(cache_dir), repo.path.name)
        self.path = usual if same_disk(usual, repo.blobs) else repo.blobs / OWN_DIR

    def part(self, file: RemoteFile) -> Path:
        """Where the bytes of a file arrive."""
        return inside(self.path, file.hash)

    def size_bytes(self, file: RemoteFile) -> int:
        """How much of a file is there."""
        return part_bytes(self.part(file))

    def prepare(self, files: Collection[RemoteFile]) -> None:
        """Makes room for the parts of these files; raises StoreError before the first byte where that cannot be."""
        self._make_directory()
        for file in files:
            part = self.part(file)
            if os.path.lexists(part) and not is_part(part):  # a link, say: what it leads to is not ours to write
                _remove_tree(part)
        wanted_bytes = sum(file.size_bytes - min(self.size_bytes(file), file.size_bytes) for file in files)
        found = os.statvfs(self.path)
        if wanted_bytes > found.f_bavail * found.f_frsize:
            room = size(found.f_bavail * found.f_frsize)
            raise DiskFull(f"{self.path}: disk full: {size(wanted_bytes)} to fetch, room for {room}; {MAKE_ROOM}")

    def _make_directory(self) -> None:
        if self.path.is_symlink():
            self.path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.path.is_relative_to(self._repo.blobs) and not self._can_move():
            self.path = self._repo.blobs / OWN_DIR
            self.path.mkdir(parents=True, exist_ok=True)

    def _can_move(self) -> bool:
        """Tries to move a file to where the blobs are: two mounts of one disk look the same until then."""
        there = next(path for path in (self._repo.blobs, *self._repo.blobs.parents) if path.is_dir())
        probe = inside(self.path, PROBE)
        probe.touch()
        try:
            probe.replace(inside(there, PROBE))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return False
        finally:
            probe.unlink(missing_ok=True)
        inside(there, PROBE).unlink()
        return True


def staging_dir(cache_dir: Path) -> Path:
    """The parts of all repositories."""
    return cache_dir / OWN_DIR / "staging"


def clear_staging(cache_dir: Path, keep: Collection[Path], repos: Collection[Repo] = ()) -> None:
    """Removes all parts but those that are still wanted. Only with the lock on the cache."""
    for root in (staging_dir(cache_dir), *(repo.blobs / OWN_DIR for repo in repos)):
        if not any(path.is_relative_to(root) for path in keep):
            shutil.rmtree(root, ignore_errors=True)
            continue
        for part in [path for path in root.rglob("*") if path not in keep and (path.is_symlink() or not path.is_dir())]:
            part.unlink(missing_ok=True)


def clean_cache(cache_dir: Path) -> None:
    """Removes the scratch files of a run that was killed, but for those of repositories."""
    own = cache_dir / OWN_DIR
    left = [cache_dir / PROBE, *cache_dir.glob(f".{LOCK_FILE}.*"), *own.glob(".*.*"), *own.glob("probe-*")]
    for path in left:
        with suppress(OSError):
            _remove_tree(path)


def _remove_tree(path: Path) -> None:
    """Removes a directory with all in it, or a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _device(path: Path) -> int | None:
    for existing in (path, *path.parents):
        with suppress(OSError):
            return existing.stat().st_dev
    return None


def _entries(directory: Path) -> list[Path]:
    with suppress(OSError):
        return list(directory.iterdir())
    return []


def _links(snapshot: Path) -> Iterator[str]:
    """The blobs that a snapshot leads to, in all its directories."""
    if snapshot.is_symlink():
        return
    for path in snapshot.rglob("*"):
        if path.is_symlink() and HASH.fullmatch(name := path.readlink().name):
            yield name
