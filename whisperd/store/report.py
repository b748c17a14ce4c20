"""What came of a reconcile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from whisperd.errors import Error, HubError
from whisperd.store.plan import CachePlan, Removal, size

Outcome = Literal["ok", "downloaded", "updated", "repaired", "pending", "failed"]

PENDING = 3
UNCHECKED = 4
WORDS: tuple[Outcome, ...] = ("downloaded", "updated", "repaired", "ok", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to reconcile.

    ``check`` only plans. ``force`` fetches every file anew, ``verify`` hashes every file, ``update`` moves branches,
    ``prune`` removes what whisperd has fetched and nobody declares any more. ``import_dir`` is asked in place of the
    Hub. All blobs of the cache together stay below ``max_cache_bytes``.
    """

    cache_dir: Path
    endpoint: str
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    force: bool = False
    verify: bool = False
    update: bool = False
    check: bool = False
    prune: bool = False
    import_dir: Path | None = None
    max_cache_bytes: int | None = None
    metadata_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    retry_wait_s: float = 1.0
    parallel: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one model. ``path`` is a complete, verified snapshot or None."""

    name: str
    outcome: Outcome
    path: Path | None = None
    commit: str | None = None
    error: Error | None = None
    warning: str | None = None
    fetched_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "path": str(self.path) if self.path else None,
            "commit": self.commit,
            "error": {"code": self.error.code, "message": str(self.error)} if self.error else None,
            "warning": self.warning,
            "fetched_bytes": self.fetched_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The results of all models, in the order of their declaration."""

    plan: CachePlan
    results: tuple[Result, ...]
    removed: tuple[Removal, ...] = ()
    wall_s: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 converged, 1 or the failures' common code, 3 changes pending, 4 the Hub could not be asked."""
        errors = [result.error for result in self.results if result.error is not None]
        pending = any(result.outcome == "pending" for result in self.results) or self._prune_pending
        if not errors:
            return PENDING if pending else 0
        if any(result.outcome == "failed" for result in self.results):
            codes = {error.exit_code for error in errors}
            return codes.pop() if len(codes) == 1 else 1
        return UNCHECKED if any(isinstance(error, HubError) for error in errors) else 1

    @property
    def _prune_pending(self) -> bool:
        return self.plan.prune and len(self.removed) < len(self.plan.removals)

    @property
    def snapshots(self) -> Mapping[str, Path]:
        """Where the models are that can be served."""
        return {result.name: result.path for result in self.results if result.path is not None}

    def lines(self) -> list[str]:
        """The outcome for people."""
        said = {action.name for action in self.plan.actions if action.kind == "blocked"}  # by the plan
        failed = [result for result in self.results if result.error is not None]
        told = [f"  x {result.name}: {result.error}" for result in failed if result.name not in said]
        told += [f"  warning: {result.name}: {result.warning}" for result in self.results if result.warning]
        counts = Counter(result.outcome for result in self.results)
        if counts["pending"] or self._prune_pending or self.exit_code == UNCHECKED:
            return told
        if not self.plan.pending and not told:
            return []  # the plan has said that as well
        fetched = sum(result.fetched_bytes for result in self.results)
        words = ", ".join(f"{counts[word]} {'unchanged' if word == 'ok' else word}" for word in WORDS)
        if self.removed:
            words += f", {len(self.removed)} removed"
        outcome = "incomplete" if failed else "complete"
        return [*told, f"Reconcile {outcome}: {words} ({size(fetched)} in {self.wall_s:.1f} s)."]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "exit_code": self.exit_code,
            "wall_s": round(self.wall_s, 3),
            "plan": self.plan.lines(),
            "removed": [{"repo": removal.repo, "commit": removal.commit} for removal in self.removed],
            "models": [result.as_dict() for result in self.results],
        }
