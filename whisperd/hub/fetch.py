"""Files of one commit into a directory of their own, by a child process that can be killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from whisperd.errors import HubUnreachable
from whisperd.hub.process import Connection, Stalled, environment, run

log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchJob:
    """What to fetch. ``cache_dir`` gets the layout of a Hugging Face cache with nothing but these files."""

    repo: str
    commit: str
    files: tuple[str, ...]
    cache_dir: Path


def fetch(job: FetchJob, connection: Connection, on_bytes: OnBytes, cancel: threading.Event) -> None:
    """Fetches; what arrived is not verified yet.

    A download that stands still is tried once more, over plain HTTP: xet is known to hang.

    Raises:
        HubError, DiskFull, CachePermissionError: what the child met.
        Cancelled: ``cancel`` was set; the child is dead.
    """
    try:
        _fetch(job, connection, on_bytes, cancel, xet=True)
    except Stalled:
        log.warning("%s: the download stands still, trying once more without xet", job.repo)
    else:
        return
    try:
        _fetch(job, connection, on_bytes, cancel, xet=False)
    except Stalled as error:
        raise HubUnreachable(
            f"{job.repo} on {connection.endpoint}: the download made no progress for {connection.stall_timeout_s:g} s"
        ) from error


def _fetch(job: FetchJob, connection: Connection, on_bytes: OnBytes, cancel: threading.Event, *, xet: bool) -> None:
    order = {
        "do": "fetch",
        "repo": job.repo,
        "revision": job.commit,
        "commit": job.commit,
        "files": job.files,
        "cache_dir": str(job.cache_dir),
        "endpoint": connection.endpoint,
        "token": connection.token,
        "timeout_s": connection.metadata_timeout_s,
        "environment": environment(connection, xet=xet),
    }
    for message in run(order, stall_timeout_s=connection.stall_timeout_s, cancel=cancel):
        if message["event"] == "progress":
            on_bytes(message["bytes"])
