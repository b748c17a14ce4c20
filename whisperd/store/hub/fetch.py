"""Files of one commit, fetched by a child process that can be killed; the next one goes on where it stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from whisperd.errors import HubUnreachable
from whisperd.store.hub.failures import CURES
from whisperd.store.hub.process import Connection, Stalled, environment, run
from whisperd.store.plan import RemoteFile

log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]

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
