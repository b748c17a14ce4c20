"""One action of a plan, done: fetch aside, verify, move in, link, switch. Until the switch the old files serve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from whisperd.errors import IntegrityError
from whisperd.reference import HubSource
from whisperd.store.cache import Repo, Staging, install
from whisperd.store.hub import FetchJob, disk_error
from whisperd.store.hub.failures import CURES
from whisperd.store.origins import Origin
from whisperd.store.plan import Action, RemoteFile, Resolved
from whisperd.store.verify import hash_of
from whisperd.store.wording import short

log = logging.getLogger(__name__)

FETCHES = 2  # wrong bytes are fetched once more: a proxy or a disk may have had a bad moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Applier:
    """Does actions; may be used by several threads for different repositories.

    ``on_bytes`` hears the name of the model and how much of its files is there.
    """

    cache_dir: Path
    origin: Origin
    on_bytes: Callable[[str, int], None]

    def apply(self, action: Action, source: HubSource, target: Resolved) -> Path:
        """Makes ``target`` complete and current; returns its snapshot.

        Raises:
            StoreError: what was there before is as it was.
            Cancelled: the same.
        """
        repo = Repo(self.cache_dir, source.repo_id)
        staging = Staging(self.cache_dir, source.repo_id)
        try:
            if action.files:
                self._fetch_verified(action, source, target, staging)
            for file in action.files:
                install(staging.part(file), repo, file)
            for file in target.files:
                repo.link(target.commit, file)
            repo.write_ref(source, target.commit)
        except OSError as error:
            raise disk_error(error, repo.path) from error
        log.info("%s is at %s", source, short(target.commit))
        return repo.snapshot(target.commit)

    def _fetch_verified(self, action: Action, source: HubSource, target: Resolved, staging: Staging) -> None:
        staging.path.mkdir(parents=True, exist_ok=True)
        missing: Sequence[RemoteFile] = action.files
        for _ in range(FETCHES):
            whole_bytes = action.total_bytes - sum(file.size_bytes for file in missing)
            job = FetchJob(repo=source.repo_id, commit=target.commit, files=tuple(missing), directory=staging.path)
            self.origin.fetch(job, partial(self._tell, action.name, whole_bytes))
            wrong = {file: found for file in missing if (found := _hash_of(staging.part(file), file)) != file.hash}
            if not wrong:
                self.on_bytes(action.name, action.total_bytes)
                return
            for file in wrong:
                staging.part(file).unlink(missing_ok=True)
            missing = tuple(wrong)
        file, found = next(iter(wrong.items()))
        raise IntegrityError(
            f"{source}: {file.path} came with wrong bytes {FETCHES} times: expected {file.hash}, got {found}; "
            f"{CURES[IntegrityError]}"
        )

    def _tell(self, name: str, whole_bytes: int, part_bytes: int) -> None:
        self.on_bytes(name, whole_bytes + part_bytes)


def _hash_of(part: Path, file: RemoteFile) -> str:
    if not part.is_file():
        return "no file"
    size_bytes = part.stat().st_size
    return hash_of(part, file.hash) if size_bytes == file.size_bytes else f"{size_bytes} bytes"
