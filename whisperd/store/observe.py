"""What is there, without asking anybody; and where the Hub has to be asked, what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from whisperd.errors import Cancelled, Error, SourceError, StoreError
from whisperd.reference import HubSource, PackageSource, PathSource
from whisperd.store.cache import Inspector, Repo
from whisperd.store.local import check
from whisperd.store.lockfile import Record
from whisperd.store.plan import ModelState, Resolved, select_files
from whisperd.store.sources import Wanted, locate
from whisperd.store.staging import Staging

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
