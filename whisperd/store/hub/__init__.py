"""The Hugging Face Hub: ask for metadata, fetch files. The library itself is only imported in a child process."""

from __future__ import annotations

from whisperd.store.hub.client import FetchJob, fetch, resolve
from whisperd.store.hub.failures import disk_error
from whisperd.store.hub.process import Connection

__all__ = ["Connection", "FetchJob", "disk_error", "fetch", "resolve"]
