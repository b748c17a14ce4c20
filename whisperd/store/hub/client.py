"""Resolves a revision and fetches the files of a commit, each in a child process that can be killed at any time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from whisperd.errors import HubError, HubUnreachable
from whisperd.reference import HubSource
from whisperd.store.hub.failures import CURES
from whisperd.store.hub.process import Connection, Stalled, environment, run
from whisperd.store.plan import RemoteFile, Resolved, select_files

log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]

# a child may start slowly, and wait between its tries as long as a server asks for
SLACK_S = 60.0
TRIES = 2  # a connection that stands still is often only that one connection


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchJob:
    """What to fetch. Each file lands in ``directory`` under the name of its hash; what is there already is kept."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    directory: Path

    @property
    def size_bytes(self) -> int:
        """How much has arrived."""
        paths = [self.directory / file.hash for file in self.files]
        return sum(path.stat().st_size for path in paths if path.exists())


def fetch(job: FetchJob, connection: Connection, on_bytes: OnBytes, cancel: threading.Event) -> None:
    """Fetches; what arrived is not verified yet. ``on_bytes`` hears how much there is, many times a second.

    Raises:
        HubError, DiskFull, CachePermissionError: what the child met.
        Cancelled: ``cancel`` was set; the child is dead.
    """
    for _ in range(TRIES):
        try:
            _fetch(job, connection, on_bytes, cancel)
        except Stalled:
            log.warning("%s: the download stands still", job.repo)
        else:
            return
    raise HubUnreachable(
        f"{job.repo} on {connection.endpoint}: the download made no progress for {connection.stall_timeout_s:g} s, "
        f"{TRIES} times; {CURES[HubUnreachable]}; what has arrived is kept"
    )


def _fetch(job: FetchJob, connection: Connection, on_bytes: OnBytes, cancel: threading.Event) -> None:
    order = {
        "do": "fetch",
        "repo": job.repo,
        "revision": job.commit,
        "commit": job.commit,
        "files": [asdict(file) for file in job.files],
        "directory": str(job.directory),
        "endpoint": connection.endpoint,
        "token": connection.token,
        "retry_wait_s": connection.retry_wait_s,
        "environment": environment(connection),
    }

    def size_bytes() -> int:
        size = job.size_bytes
        on_bytes(size)
        return size

    for _ in run(order, stall_timeout_s=connection.stall_timeout_s, cancel=cancel, size_bytes=size_bytes):
        pass  # only retries are told; errors are raised


def resolve(source: HubSource, connection: Connection, cancel: threading.Event) -> Resolved:
    """The files of a repository that an engine needs.

    Raises:
        HubError: one of its kinds, for everything that the Hub says or does not say.
        SourceError: the repository holds no model that whisperd can read.
        Cancelled: ``cancel`` was set.
    """
    job = {
        "do": "resolve",
        "repo": source.repo_id,
        "revision": source.revision,
        "endpoint": connection.endpoint,
        "token": connection.token,
        "retry_wait_s": connection.retry_wait_s,
        "timeout_s": connection.metadata_timeout_s,
        "environment": environment(connection),
    }
    try:
        for message in run(job, stall_timeout_s=connection.metadata_timeout_s + SLACK_S, cancel=cancel):
            if message["event"] == "done":
                files = [RemoteFile(**file) for file in message["files"]]
                return Resolved(commit=message["commit"], files=select_files(files))
    except Stalled as error:
        raise HubUnreachable(f"{source} on {connection.endpoint}: no answer in time; check the network") from error
    raise HubError(f"{source} on {connection.endpoint}: the Hub was asked, but no answer came back")
