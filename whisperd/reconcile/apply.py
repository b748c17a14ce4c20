"""One action of a plan, done: fetch aside, verify, move in, link, switch. Until the switch the old files serve."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from whisperd.errors import IntegrityError
from whisperd.hub import Connection, FetchJob, disk_error, fetch
from whisperd.plan import Action, RemoteFile, Resolved, short
from whisperd.reconcile.cache import Repo, git_or_sha256, install, staging_dir
from whisperd.reconcile.report import Progress
from whisperd.sources import HubSource

log = logging.getLogger(__name__)

FETCHES = 2  # wrong bytes are fetched once more: a proxy or a disk may have had a bad moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Applier:
    """Does actions; may be used by several threads for different models."""

    cache_dir: Path
    connection: Connection
    on_progress: Callable[[Progress], None]
    cancel: threading.Event

    def apply(self, action: Action, source: HubSource, target: Resolved) -> Path:
        """Makes ``target`` complete and current; returns its snapshot.

        Raises:
            StoreError: what was there before is as it was.
            Cancelled: the same.
        """
        repo = Repo(self.cache_dir, source.repo_id)
        staged = Repo(staging_dir(self.cache_dir), source.repo_id)
        if action.files:
            self._fetch_verified(action, source, target, staged)
        try:
            for file in action.files:
                install((staged.snapshot(target.commit) / file.path).resolve(), repo, file)
            for file in target.files:
                repo.link(target.commit, file)
            _copy_tree_listing(staged, repo, target.commit)
            repo.write_ref(source, target.commit)
        except OSError as error:
            raise disk_error(error, repo.path) from error
        log.info("%s is at %s", source, short(target.commit))
        return repo.snapshot(target.commit)

    def _fetch_verified(self, action: Action, source: HubSource, target: Resolved, staged: Repo) -> None:
        missing: Sequence[RemoteFile] = action.files
        for _ in range(FETCHES):
            job = FetchJob(
                repo=source.repo_id,
                commit=target.commit,
                files=tuple(file.path for file in missing),
                cache_dir=staging_dir(self.cache_dir),
            )
            fetch(job, self.connection, lambda n_bytes: self._tell(action, n_bytes), self.cancel)
            wrong = {file: found for file in missing if (found := _hash_of(staged, target, file)) != file.hash}
            if not wrong:
                self._tell(action, action.bytes)
                return
            for file in wrong:
                _discard(staged.snapshot(target.commit) / file.path)
            missing = tuple(wrong)
        file, found = next(iter(wrong.items()))
        raise IntegrityError(
            f"{source}: {file.path} came with wrong bytes {FETCHES} times: expected {file.hash}, got {found}; "
            "look for a proxy or a mirror that changes files"
        )

    def _tell(self, action: Action, n_bytes: int) -> None:
        self.on_progress(Progress(name=action.name, done_bytes=min(n_bytes, action.bytes), total_bytes=action.bytes))


def _hash_of(staged: Repo, target: Resolved, file: RemoteFile) -> str:
    path = staged.snapshot(target.commit) / file.path
    if not path.is_file():
        return "no file"
    size_bytes = path.stat().st_size
    return git_or_sha256(path, file.hash) if size_bytes == file.size_bytes else f"{size_bytes} bytes"


def _discard(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.resolve().unlink()
        path.unlink()


def _copy_tree_listing(staged: Repo, repo: Repo, commit: str) -> None:
    """huggingface_hub's own list of a commit's files, by which it knows a complete snapshot offline."""
    name = f"{commit}.json"
    listing = staged.path / "trees" / name
    if listing.is_file() and not (repo.path / "trees" / name).exists():
        (repo.path / "trees").mkdir(parents=True, exist_ok=True)
        # it is made for its owner alone; whoever may read the snapshot may read this
        shutil.copyfile(listing, repo.path / "trees" / name)
