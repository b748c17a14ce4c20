"""Does one action of a plan: fetch aside, verify, move in, link, look once more, switch.

Until the switch the old files serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from whisperd.errors import IntegrityError
from whisperd.reference import HubSource
from whisperd.store.cache import Repo, Staging
from whisperd.store.hub import FetchJob, disk_error
from whisperd.store.hub.failures import CURES
from whisperd.store.hub.transfer import is_part
from whisperd.store.names import listing
from whisperd.store.origins import Origin
from whisperd.store.plan import Action, RemoteFile, Resolved, contents_of
from whisperd.store.verify import Inspector, hash_of
from whisperd.store.wording import short

log = logging.getLogger(__name__)

FETCHES = 2  # wrong bytes are fetched once more: a proxy or a disk may have had a bad moment
LOOKS = 2  # what another tool has removed meanwhile is fetched once more


@dataclass(frozen=True, slots=True, kw_only=True)
class Applier:
    """Does actions; several threads may use one for different repositories.

    ``on_bytes`` is called with the name of the model and how many bytes of its files are there.
    """

    repo: Repo
    staging: Staging
    origin: Origin
    inspector: Inspector
    on_bytes: Callable[[str, int], None]

    def apply(self, action: Action, source: HubSource, target: Resolved) -> None:
        """Makes ``target`` complete and current.

        Raises:
            StoreError: what was there before is as it was.
            Cancelled: the same.
        """
        try:
            self._complete(action, source, target)
            self.repo.switch(source, target.commit)
        except OSError as error:
            raise disk_error(error, self.repo.path) from error
        log.info("%s is at %s", source, short(target.commit))

    def _complete(self, action: Action, source: HubSource, target: Resolved) -> None:
        """Fetches, moves in and links until every file of the target is there, verified, where its link leads."""
        missing = contents_of(action.files)
        for _ in range(LOOKS):
            if missing:
                self._fetch_verified(action, missing, source, target)
            for file in missing:
                self.repo.install(self.staging.part(file), file)
                self.inspector.learn(self.repo.blob(file))
            for file in target.files:
                self.repo.link(target.commit, file)
            flawed = [file for file in target.files if self.inspector.state(self.repo, target.commit, file) != "ok"]
            if not flawed:
                return
            missing = contents_of(flawed)
            log.warning("%s: %s changed meanwhile", source, listing([file.path for file in flawed]))
        raise IntegrityError(
            f"{source}: {listing([file.path for file in missing])} changed or vanished while other files were fetched; "
            "run it again when no other program cleans the cache"
        )

    def _fetch_verified(
        self, action: Action, missing: Sequence[RemoteFile], source: HubSource, target: Resolved
    ) -> None:
        self.staging.prepare(missing)
        for _ in range(FETCHES):
            whole_bytes = max(0, action.total_bytes - sum(file.size_bytes for file in missing))
            job = FetchJob(repo=source.repo_id, commit=target.commit, files=tuple(missing), directory=self.staging.path)
            self.origin.fetch(job, partial(self._count, action.name, whole_bytes))
            wrong = {file: found for file in missing if (found := self._hash_of(file)) != file.hash}
            if not wrong:
                self.on_bytes(action.name, action.total_bytes)
                return
            for file in wrong:
                self.staging.part(file).unlink(missing_ok=True)
            missing = tuple(wrong)
        file, found = next(iter(wrong.items()))
        raise IntegrityError(
            f"{source}: {file.path} came with wrong bytes {FETCHES} times: expected {file.hash}, got {found}; "
            f"{CURES[IntegrityError]}"
        )

    def _count(self, name: str, whole_bytes: int, part_bytes: int) -> None:
        self.on_bytes(name, whole_bytes + part_bytes)

    def _hash_of(self, file: RemoteFile) -> str:
        part = self.staging.part(file)
        if not is_part(part):
            return "no file"
        size_bytes = part.stat().st_size
        return hash_of(part, file.hash) if size_bytes == file.size_bytes else f"{size_bytes} bytes"
