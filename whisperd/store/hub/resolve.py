"""What a revision is now: its commit, and the size and hash of each file. One request, real errors."""

from __future__ import annotations

import threading

from whisperd.errors import HubError, HubUnreachable
from whisperd.reference import HubSource
from whisperd.store.hub.process import Connection, Stalled, environment, run
from whisperd.store.plan import RemoteFile, Resolved, select_files

# a child may start slowly, and wait between its tries as long as a server asks for
SLACK_S = 60.0


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
