"""The state of each declared model: what is on this disk and, where that is not enough, what the Hub answers."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from whisperd.errors import Cancelled, Error, IntegrityError, SourceError, StoreError
from whisperd.reference import HubSource, PackageSource, PathSource
from whisperd.store.cache import Repo, Staging
from whisperd.store.export import read_manifest
from whisperd.store.lockfile import Record
from whisperd.store.plan import ModelState, RemoteFile, Resolved, select_files
from whisperd.store.sources import Wanted, check_model_dir, locate
from whisperd.store.verify import Inspector

Resolve = Callable[[HubSource], Resolved]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One model as it was found.

    ``path`` is a complete, verified snapshot that can be served now, perhaps of an older commit than the target.
    ``error`` says why the Hub could not be asked, or why the source leads nowhere.
    """

    state: ModelState
    path: Path | None = None
    error: Error | None = None


class Observer:
    """Looks at a cache.

    Args:
        cache_dir: the cache; it need not exist.
        record: what earlier runs resolved.
        inspector: looks at the files.
    """

    def __init__(self, cache_dir: Path, record: Record, inspector: Inspector) -> None:
        self._cache_dir = cache_dir
        self._record = record
        self._inspector = inspector
        self._lock = threading.Lock()  # of the inspector: hashing is bound by the disk, one at a time is as fast

    def known(self, wanted: Wanted) -> Found:
        """The model by what is on disk alone."""
        source = wanted.source
        if not isinstance(source, HubSource):
            return self._local(wanted, source)
        entry = self.entry(source)
        if entry is None:
            return Found(state=ModelState(name=wanted.name, source=source))
        return self._found(wanted, source, entry, entry)

    def asked(self, wanted: Wanted, resolve: Resolve, *, update: bool, force: bool) -> Found:
        """The same, with the Hub's word where nothing is known, or where ``update`` asks for what is new.

        With ``force`` a commit that is known is asked for again: whoever cannot be asked cannot be fetched from.
        Raises Cancelled.
        """
        source = wanted.source
        if not isinstance(source, HubSource):
            return self._local(wanted, source)
        entry = self.entry(source)
        stays = entry is not None and (source.is_pinned or not update)
        if entry is not None and stays and not force:
            return self._found(wanted, source, entry, entry)
        try:
            asked = replace(source, revision=entry.commit) if entry is not None and stays else source
            return self._found(wanted, source, entry, resolve(asked))
        except Cancelled:
            raise  # whoever stops the asking does not want the answer "could not be asked"
        except Error as error:
            found = self.known(wanted)
            problem = str(error) if force or entry is None else ""
            return replace(found, state=replace(found.state, problem=problem), error=error)

    def entry(self, source: HubSource) -> Resolved | None:
        """What the revision is by the record, else by the ref and the links of a cache that another tool has filled."""
        if (entry := self._record.get(source)) is not None:
            return entry
        repo = Repo(self._cache_dir, source.repo_id)
        commit = repo.commit_of(source)
        with suppress(SourceError):
            return Resolved(commit=commit, files=select_files(repo.listed(commit))) if commit else None
        return None

    def _found(self, wanted: Wanted, source: HubSource, entry: Resolved | None, target: Resolved) -> Found:
        repo = Repo(self._cache_dir, source.repo_id)
        staging = Staging(self._cache_dir, source.repo_id)
        with self._lock:
            files = {file.path: self._inspector.state(repo, target.commit, file) for file in target.files}
            whole = entry is not None and all(
                self._inspector.state(repo, entry.commit, file) == "ok" for file in entry.files
            )
        state = ModelState(
            name=wanted.name,
            source=source,
            target=target,
            current_commit=entry.commit if entry else None,
            files=files,
            part_bytes={file.path: staging.size_bytes(file) for file in target.files},
            ref_ok=repo.has_ref(source, target.commit),
        )
        return Found(state=state, path=repo.snapshot(entry.commit) if entry and whole else None)

    def _local(self, wanted: Wanted, source: PathSource | PackageSource) -> Found:
        try:
            path = locate(source)
            with self._lock:
                check(source, path, self._inspector)
        except StoreError as error:
            return Found(state=ModelState(name=wanted.name, source=source, problem=str(error)), error=error)
        return Found(state=ModelState(name=wanted.name, source=source), path=path)


def check(source: PathSource | PackageSource, path: Path, inspector: Inspector) -> None:
    """Raises SourceError or IntegrityError unless the directory holds a whole model with the bytes that it should have.

    The hashes of a directory are in the manifest of an export, those of a package in its RECORD; a directory without
    a manifest is only looked at for missing and empty files.
    """
    check_model_dir(path)
    declared = list(_packaged(source, path) if isinstance(source, PackageSource) else _exported(path))
    for file in declared:
        found = inspector.content(path / file.path, file)
        if found != "ok":
            raise IntegrityError(f"{source}: {path / file.path} is not what was declared ({found.replace('_', ' ')})")


def _exported(path: Path) -> Iterator[RemoteFile]:
    manifest = read_manifest(path)
    yield from manifest.files if manifest else ()


def _packaged(source: PackageSource, path: Path) -> Iterator[RemoteFile]:
    """The files that pip has written down with their hashes."""
    top = source.module.partition(".")[0]
    for name in metadata.packages_distributions().get(top, ())[:1]:
        for file in metadata.files(name) or ():
            place = Path(str(file.locate()))
            if place.parent == path and file.hash is not None and file.hash.mode == hashlib.sha256().name:
                digest = base64.urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4)).hex()
                yield RemoteFile(path=place.name, size_bytes=file.size or 0, hash=digest)
