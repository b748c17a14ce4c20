"""The state of each declared model: what is on this disk and, where that is not enough, what the Hub answers."""

from __future__ import annotations

import base64
import hashlib
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
from whisperd.store.names import inside
from whisperd.store.plan import ModelState, RemoteFile, Resolved, select_files
from whisperd.store.schema import Tree, check_consistent, parsed, read_bounded
from whisperd.store.sources import Wanted, check_model_dir, has_usual_files, locate, reader
from whisperd.store.verify import Inspector

Resolve = Callable[[HubSource], Resolved]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the cache says of a revision.

    ``is_certain`` is False where the files of the commit are only known from what lies there: an interrupted download
    of another tool may look the same.
    """

    resolved: Resolved
    is_certain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One model as it was found.

    ``path`` is a complete, verified snapshot that can be served now, perhaps of an older commit than the target.
    ``error`` says why the Hub could not be asked, or why the source leads nowhere; ``warning`` what else is odd.
    """

    state: ModelState
    path: Path | None = None
    error: Error | None = None
    warning: str | None = None


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

    def known(self, wanted: Wanted) -> Found:
        """The model by what is on disk alone."""
        source = wanted.source
        if not isinstance(source, HubSource):
            return self._local(wanted, source)
        entry = self.entry(source)
        if entry is None:
            return Found(state=ModelState(name=wanted.name, source=source))
        return self._found(wanted, source, entry.resolved, entry.resolved)

    def asked(self, wanted: Wanted, resolve: Resolve, *, update: bool, force: bool) -> Found:
        """The model with the Hub's answer where nothing certain is known, or where ``update`` asks for what is new.

        With ``force`` a commit that is known is asked for again: what cannot be asked for cannot be fetched.
        Raises Cancelled.
        """
        source = wanted.source
        if not isinstance(source, HubSource):
            return self._local(wanted, source)
        entry = self.entry(source)
        stays = entry is not None and (source.is_pinned or not update)
        if entry is not None and entry.is_certain and stays and not force:
            return self._found(wanted, source, entry.resolved, entry.resolved)
        try:
            asked = replace(source, revision=entry.resolved.commit) if entry is not None and stays else source
            target = resolve(asked)
        except Cancelled:
            raise  # whoever stops the asking does not want the answer "could not be asked"
        except Error as error:
            found = self.known(wanted)
            problem = str(error) if force or entry is None else ""
            return replace(found, state=replace(found.state, problem=problem), error=error)
        found = self._found(wanted, source, entry.resolved if entry else None, target)
        return replace(found, warning=_renamed(source, target))

    def entry(self, source: HubSource) -> Entry | None:
        """What the revision is: by the record, else by the ref and what another tool has left of the commit."""
        if (recorded := self._record.get(source)) is not None:
            return Entry(resolved=recorded, is_certain=True)
        commit = Repo(self._cache_dir, source.repo_id).commit_of(source)
        return self._entry_of(source, commit) if commit else None

    def is_usable(self, source: HubSource) -> bool:
        """True unless what lies there may be an interrupted download, for all that can be seen without the Hub."""
        entry = self.entry(source)
        return entry is not None and (entry.is_certain or has_usual_files({file.path for file in entry.resolved.files}))

    def _entry_of(self, source: HubSource, commit: str) -> Entry | None:
        repo = Repo(self._cache_dir, source.repo_id)
        with suppress(StoreError, OSError):
            if (files := _tree(repo, commit)) is not None:
                return Entry(resolved=self._selected(repo, commit, files), is_certain=True)
        with suppress(StoreError, OSError):
            listed = repo.listed(commit)
            selected = select_files(listed, reader(repo.snapshot(commit)))
            return Entry(resolved=Resolved(commit=commit, files=selected), is_certain=False)
        return None

    def _selected(self, repo: Repo, commit: str, files: list[RemoteFile]) -> Resolved:
        """The needed files of a tree; raises StoreError where that depends on the content of a file that is missing."""
        by_path = {file.path: file for file in files}

        def read(name: str, n_bytes: int) -> bytes:
            if self._inspector.content(repo.blob(by_path[name]), by_path[name]) != "ok":
                raise SourceError(f"{name} is not in the cache")
            return reader(repo.blobs)(by_path[name].hash, n_bytes)

        return Resolved(commit=commit, files=select_files(files, read))

    def _found(self, wanted: Wanted, source: HubSource, current: Resolved | None, target: Resolved) -> Found:
        repo = Repo(self._cache_dir, source.repo_id)
        staging = Staging(self._cache_dir, repo)
        state = ModelState(
            name=wanted.name,
            source=source,
            target=target,
            current_commit=current.commit if current else None,
            files={file.path: self._inspector.state(repo, target.commit, file) for file in target.files},
            part_bytes={file.path: staging.size_bytes(file) for file in target.files},
            ref_ok=self._has_ref(repo, source, target.commit),
        )
        return Found(state=state, path=self._servable(repo, source, current))

    def _servable(self, repo: Repo, source: HubSource, current: Resolved | None) -> Path | None:
        """The snapshot that can serve: the recorded commit, else the one to which another tool has moved the branch."""
        if current is not None and self._inspector.is_whole(repo, current):
            return repo.snapshot(current.commit)
        moved = None if source.is_pinned else repo.named(source.revision)
        if moved is not None and (current is None or moved != current.commit) and self._is_whole(repo, source, moved):
            return repo.snapshot(moved)
        return None

    def _has_ref(self, repo: Repo, source: HubSource, commit: str) -> bool:
        """True if other tools that follow the revision find this commit, or a whole one that they have moved to."""
        if source.is_pinned or repo.cannot_name(source):
            return repo.is_kept(commit)
        named = repo.named(source.revision)
        return named is not None and (named == commit or self._is_whole(repo, source, named))

    def _is_whole(self, repo: Repo, source: HubSource, commit: str) -> bool:
        entry = self._entry_of(source, commit)
        return entry is not None and self._inspector.is_whole(repo, entry.resolved)

    def _local(self, wanted: Wanted, source: PathSource | PackageSource) -> Found:
        try:
            path = locate(source)
            check(source, path, self._inspector)
        except StoreError as error:
            return Found(state=ModelState(name=wanted.name, source=source, problem=str(error)), error=error)
        return Found(state=ModelState(name=wanted.name, source=source), path=path)


def _tree(repo: Repo, commit: str) -> list[RemoteFile] | None:
    """Every file of a commit by the list of huggingface_hub; None where there is none that can be understood."""
    try:
        files = parsed(Tree, read_bounded(repo.tree_file(commit))).remote_files
        check_consistent(files)
    except (OSError, ValueError):
        return None
    return files


def _renamed(source: HubSource, target: Resolved) -> str | None:
    if target.repo in (None, source.repo_id):
        return None
    return f"the Hub calls {source.repo_id} {target.repo} now; write that name"


def check(source: PathSource | PackageSource, path: Path, inspector: Inspector) -> None:
    """Raises SourceError or IntegrityError unless the directory holds a whole model with the bytes that it should have.

    The hashes of a directory are in the manifest of an export, those of a package in its RECORD; a directory without
    a manifest is only looked at for missing and empty files.
    """
    check_model_dir(path)
    declared = list(_packaged(source, path) if isinstance(source, PackageSource) else _exported(path))
    for file in declared:
        place = inside(path, *file.path.split("/"))
        found = inspector.content(place, file)
        if found != "ok":
            raise IntegrityError(f"{source}: {place} is not what was declared ({found.replace('_', ' ')})")


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
