"""Who is asked for models: the Hub, or a directory that another machine has exported."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from whisperd.errors import HubUnreachable
from whisperd.reference import HubSource
from whisperd.store.hub import Connection, FetchJob, fetch, resolve
from whisperd.store.hub.fetch import OnBytes
from whisperd.store.plan import Resolved


class Origin(Protocol):
    """Knows what a revision is, and has the bytes. Used by several threads."""

    def resolve(self, source: HubSource) -> Resolved:
        """The commit and the files of a revision now; raises StoreError or Cancelled."""
        ...

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """The files of a commit, as far as they are not there already; raises StoreError or Cancelled."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOrigin:
    """The Hub."""

    connection: Connection
    cancel: threading.Event

    def resolve(self, source: HubSource) -> Resolved:
        """One request."""
        return resolve(source, self.connection, self.cancel)

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """By a child process."""
        fetch(job, self.connection, on_bytes, self.cancel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nowhere:
    """In place of the Hub when nobody may be asked."""

    def resolve(self, source: HubSource) -> Resolved:
        """Not here."""
        raise HubUnreachable(
            f"{source} is not complete in the cache, and offline is set; unset it (offline in [reconcile], "
            "HF_HUB_OFFLINE), or bring the files with: whisperd reconcile --import DIR"
        )

    def fetch(self, job: FetchJob, on_bytes: OnBytes) -> None:
        """Nothing."""
        raise HubUnreachable(f"{job.repo}: {len(job.files)} files have to be fetched, and offline is set")
