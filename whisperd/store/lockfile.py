"""What whisperd remembers of a cache: the commit that each revision was resolved to, and the commits it has fetched."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from whisperd.errors import SourceError
from whisperd.reference import HubSource, parse
from whisperd.store.cache import LOCK_FILE, OWN_DIR, replace_text
from whisperd.store.plan import Resolved
from whisperd.store.schema import Lock, parsed, read_bounded

log = logging.getLogger(__name__)

VERSION = 1
LOCK_BYTES = 16 << 20


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
        """Forgets a commit that is removed."""
        self.owned[repo_id] = self.owned.get(repo_id, frozenset()) - {commit}
        for name, resolved in list(self.entries.items()):
            if name.partition("@")[0] == repo_id and resolved.commit == commit:
                del self.entries[name]

    def commits(self, repo_id: str) -> frozenset[str]:
        """The commits of a repository that some revision was resolved to."""
        return frozenset(one.commit for name, one in self.entries.items() if name.partition("@")[0] == repo_id)

    def write(self, cache_dir: Path) -> None:
        """Writes ``whisperd.lock``, in an order that makes good diffs."""
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
        replace_text(cache_dir / LOCK_FILE, json.dumps(whole, indent=2) + "\n", cache_dir / OWN_DIR)


def read_record(cache_dir: Path) -> Record:
    """Reads ``whisperd.lock``. A damaged one is logged and counts as empty: the refs say the same, less exactly."""
    path = cache_dir / LOCK_FILE
    try:
        found = parsed(Lock, read_bounded(path, LOCK_BYTES))
        for name in [*found.models, *(f"{repo_id}@main" for repo_id in found.fetched)]:
            _check_key(name)
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the next reconcile that fetches writes it anew", path, error)
        return Record()
    return Record(
        entries={name: entry.resolved for name, entry in found.models.items()},
        resolved_at_s={name: float(entry.resolved_at) for name, entry in found.models.items()},
        owned={repo_id: frozenset(commits) for repo_id, commits in found.fetched.items()},
    )


def _check_key(name: str) -> None:
    """Raises ValueError unless the key of an entry is a reference to a repository."""
    try:
        source = parse(name)
    except SourceError as error:
        raise ValueError(str(error)) from error
    if str(source) != name or not isinstance(source, HubSource):
        raise ValueError(f"expected owner/name@revision, got {name!r}")
