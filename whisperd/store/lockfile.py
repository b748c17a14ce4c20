"""What whisperd remembers of a cache: which commit a revision was resolved to, and which bytes were verified."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whisperd.files import write_atomically
from whisperd.reference import HubSource
from whisperd.store.plan import RemoteFile, Resolved

log = logging.getLogger(__name__)

VERSION = 1
LOCK_FILE = "whisperd.lock"


@dataclass(slots=True, kw_only=True)
class Record:
    """The contents of ``whisperd.lock``: commits and files by ``owner/name@revision``.

    ``owned`` are the commits of each repository that whisperd itself has fetched: what ``--prune`` may remove.
    """

    entries: dict[str, Resolved] = field(default_factory=dict)
    resolved_at_s: dict[str, float] = field(default_factory=dict)
    owned: dict[str, frozenset[str]] = field(default_factory=dict)

    def get(self, source: HubSource) -> Resolved | None:
        """What the revision was resolved to when it was last fetched."""
        return self.entries.get(str(source))

    def put(self, source: HubSource, resolved: Resolved) -> None:
        """Remembers it; the time changes only with the commit."""
        known = self.entries.get(str(source))
        if known != resolved:
            self.resolved_at_s[str(source)] = time.time()
        self.entries[str(source)] = resolved

    def own(self, repo_id: str, commit: str) -> None:
        """Remembers that whisperd has fetched a commit."""
        self.owned[repo_id] = self.owned.get(repo_id, frozenset()) | {commit}

    def forget(self, repo_id: str, commit: str) -> None:
        """The commit is gone."""
        self.owned[repo_id] = self.owned.get(repo_id, frozenset()) - {commit}
        for name, resolved in list(self.entries.items()):
            if name.partition("@")[0] == repo_id and resolved.commit == commit:
                del self.entries[name]

    def write(self, cache_dir: Path) -> None:
        """To ``whisperd.lock``, in an order that makes good diffs."""
        models = {
            name: {
                "commit": resolved.commit,
                "resolved_at": round(self.resolved_at_s.get(name, 0.0)),
                "files": [asdict(file) for file in resolved.files],
            }
            for name, resolved in sorted(self.entries.items())
        }
        fetched = {repo_id: sorted(commits) for repo_id, commits in sorted(self.owned.items()) if commits}
        whole = {"version": VERSION, "models": models, "fetched": fetched}
        write_atomically(cache_dir / LOCK_FILE, json.dumps(whole, indent=2) + "\n")


def read_record(cache_dir: Path) -> Record:
    """What is on disk. A damaged file is told and counts as empty: the refs of the cache say the same, less exactly."""
    path = cache_dir / LOCK_FILE
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        models: Mapping[str, Any] = whole["models"] if whole["version"] == VERSION else {}
        return Record(
            entries={name: _resolved(entry) for name, entry in models.items()},
            resolved_at_s={name: float(entry["resolved_at"]) for name, entry in models.items()},
            owned={repo_id: frozenset(commits) for repo_id, commits in whole.get("fetched", {}).items()},
        )
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%r); the next reconcile that fetches writes it anew", path, error)
        return Record()


def _resolved(entry: Mapping[str, Any]) -> Resolved:
    return Resolved(commit=entry["commit"], files=tuple(RemoteFile(**file) for file in entry["files"]))
