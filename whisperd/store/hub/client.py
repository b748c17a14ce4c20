"""Resolves a revision and fetches the files of a commit, each in a child process that can be killed at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from whisperd.errors import HubError, HubUnreachable
from whisperd.reference import HubSource
from whisperd.store.hub.failures import CURES
from whisperd.store.hub.process import Connection, Message, Pace, Stalled, environment, run
from whisperd.store.hub.transfer import part_bytes
from whisperd.store.names import inside
from whisperd.store.plan import RemoteFile, Resolved
from whisperd.store.schema import CommitFiles, checked
from whisperd.store.wording import size

OnBytes = Callable[[int], None]

MIN_BYTES_PER_S = 1000  # 3 GB would take a month
SILENCES = 3  # a connection that stands still is opened anew so often within the time that a download may stand still
SILENCE_MAX_S = 10.0
SLACK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchJob:
    """What to fetch: one file for each content.

    Each lands in ``directory`` under the name of its hash; what is there already is kept.
    """

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    directory: Path

    @property
    def size_bytes(self) -> int:
        """How much has arrived."""
        return sum(part_bytes(inside(self.directory, file.hash)) for file in self.files)


def fetch(job: FetchJob, connection: Connection, on_bytes: OnBytes, cancel: threading.Event) -> None:
    """Fetches; what arrived is not verified yet. ``on_bytes`` is called with how much there is, many times a second.

    Raises:
        HubError, DiskFull, CachePermissionError: what the child met.
        Cancelled: ``cancel`` was set.
    """

    def size_bytes() -> int:
        arrived_bytes = job.size_bytes
        on_bytes(arrived_bytes)
        return arrived_bytes

    window_s = connection.stall_timeout_s
    order = {
        "do": "fetch",
        "repo": job.repo,
        "revision": job.commit,
        "commit": job.commit,
        "files": [asdict(file) for file in job.files],
        "directory": str(job.directory),
        "timeout_s": min(window_s / SILENCES, SILENCE_MAX_S),
        **_common(connection),
    }
    try:
        pace = Pace(window_s=window_s, min_bytes=MIN_BYTES_PER_S * window_s)
        run(order, pace, cancel=cancel, size_bytes=size_bytes)
    except Stalled as error:
        raise HubUnreachable(
            f"{job.repo} on {connection.endpoint}: fewer than {size(MIN_BYTES_PER_S)}/s came for {window_s:g} s; "
            f"{CURES[HubUnreachable]}; what has arrived is kept"
        ) from error


def resolve(source: HubSource, connection: Connection, cancel: threading.Event) -> Resolved:
    """The commit of a revision, and the files of it that an engine needs.

    Raises:
        HubError: one of its kinds, for everything that the Hub says or does not say.
        SourceError: the repository holds no model that whisperd can read.
        Cancelled: ``cancel`` was set.
    """
    order = {
        "do": "resolve",
        "repo": source.repo_id,
        "revision": source.revision,
        "timeout_s": connection.metadata_timeout_s,
        **_common(connection),
    }
    place = f"{source} on {connection.endpoint}"
    window_s = 4 * connection.metadata_timeout_s + SLACK_S  # up to three answers, and the time to connect
    try:
        message = run(order, Pace(window_s=window_s), cancel=cancel)
    except Stalled as error:
        raise HubUnreachable(f"{place}: no answer in time; check the network") from error
    return _checked(source, message, place)


def _checked(source: HubSource, message: Message, place: str) -> Resolved:
    try:
        found = checked(CommitFiles, {key: value for key, value in message.items() if key != "event"}).resolved
    except ValueError as error:
        raise HubError(f"{place}: this is no answer of a Hub: {error}") from error
    if source.is_pinned and found.commit != source.revision:
        raise HubError(f"{place}: asked for this commit, the Hub answered with {found.commit}; check the endpoint")
    return found


def _common(connection: Connection) -> Message:
    return {
        "endpoint": connection.endpoint,
        "token": connection.token,
        "retry_wait_s": connection.retry_wait_s,
        "environment": environment(connection),
    }
