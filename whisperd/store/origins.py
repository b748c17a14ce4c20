"""Who is asked for models: the Hub, a directory that another machine has exported, or nobody."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from whisperd.errors import HubUnreachable, RevisionNotFound, StoreError
from whisperd.reference import HubSource
from whisperd.store.export import MANIFEST, Manifest, read_manifest
from whisperd.store.hub import Connection, FetchJob, disk_error, fetch, resolve
from whisperd.store.hub.client import OnBytes
from whisperd.store.names import inside
from whisperd.store.plan import Resolved


class Origin(Protocol):
    """Knows what a revision is, and has the bytes. Used by several threads."""

    def resolve(self, source: HubSource) -> Resolved:
        """The commit and the files of a revision now; raises StoreError or Cancelled."""
        ...

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """Fetches the files of a commit, as far as they are not there already; raises StoreError or Cancelled."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOrigin:
    """The Hub."""

    connection: Connection
    cancel: threading.Event

    def resolve(self, source: HubSource) -> Resolved:
        """Asks the Hub, in a child process."""
        return resolve(source, self.connection, self.cancel)

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """Fetches in a child process."""
        fetch(job, self.connection, on_bytes, self.cancel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nowhere:
    """In place of the Hub when nobody may be asked."""

    def resolve(self, source: HubSource) -> Resolved:
        """Raises HubUnreachable."""
        raise HubUnreachable(
            f"{source} is not complete in the cache, and offline is set; unset it (offline in [reconcile], "
            "HF_HUB_OFFLINE), or bring the files with: whisperd reconcile --import DIR"
        )

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """Raises HubUnreachable."""
        raise HubUnreachable(f"{job.repo}: {len(job.files)} files have to be fetched, and offline is set")


class ExportedOrigin:
    """A directory of exported models, asked in place of the Hub; what it gives is verified all the same."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._models: Sequence[tuple[Path, Manifest]] = tuple(_manifests(directory))
        if not self._models:
            raise StoreError(f"{directory}: no exported model here; expected directories with a {MANIFEST}")

    def resolve(self, source: HubSource) -> Resolved:
        """Finds the model by repository and revision, or by commit."""
        for _, manifest in self._models:
            if manifest.repo == source.repo_id and source.revision in (manifest.revision, manifest.commit):
                return Resolved(commit=manifest.commit, files=manifest.files)
        have = ", ".join(f"{manifest.repo}@{manifest.revision}" for _, manifest in self._models)
        raise RevisionNotFound(f"{source} is not in {self._directory}, which has: {have}")

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """Copies the files."""
        directory = next(
            path for path, manifest in self._models if (manifest.repo, manifest.commit) == (job.repo, job.commit)
        )
        for file in job.files:
            place = inside(directory, *file.path.split("/"))
            try:
                _copy(place, inside(job.directory, file.hash))
            except OSError as error:
                raise disk_error(error, place) from error
            on_bytes(job.size_bytes)


def _copy(source: Path, part: Path) -> None:
    """Copies a regular file; the part is made anew, so that a link that lies there is not followed."""
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as data:
        if not stat.S_ISREG(os.fstat(data.fileno()).st_mode):
            raise StoreError(f"{source} is not a regular file; export the model again")
        part.unlink(missing_ok=True)
        with part.open("xb") as out:
            shutil.copyfileobj(data, out, 1 << 20)


def _manifests(directory: Path) -> Iterator[tuple[Path, Manifest]]:
    for path in sorted(directory.glob(f"*/{MANIFEST}")):
        if (manifest := read_manifest(path.parent)) is not None:
            yield path.parent, manifest
