"""What came of a reconcile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from whisperd.errors import Error, HubError
from whisperd.plan import CachePlan, size

Outcome = Literal["ok", "downloaded", "updated", "repaired", "pending", "failed"]

PENDING = 3
UNCHECKED = 4
WORDS: tuple[Outcome, ...] = ("downloaded", "updated", "repaired", "ok", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to reconcile.

    ``check`` only plans. ``force`` fetches every file anew, ``verify`` hashes every file, ``update`` moves branches.
    """

    cache_dir: Path
    endpoint: str
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    force: bool = False
    verify: bool = False
    update: bool = False
    check: bool = False
    metadata_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    parallel: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the download of one model is."""

    name: str
    done_bytes: int
    total_bytes: int


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
    wall_s: float

    @property
    def exit_code(self) -> int:
        """0 converged, 1 or the failures' common code, 3 changes pending, 4 the Hub could not be asked."""
        errors = [result.error for result in self.results if result.error is not None]
        pending = any(result.outcome == "pending" for result in self.results)
        if not errors:
            return PENDING if pending else 0
        if any(result.outcome == "failed" for result in self.results):
            codes = {error.exit_code for error in errors}
            return codes.pop() if len(codes) == 1 else 1
        return UNCHECKED if any(isinstance(error, HubError) for error in errors) else 1

    @property
    def snapshots(self) -> Mapping[str, Path]:
        """Where the models are that can be served."""
        return {result.name: result.path for result in self.results if result.path is not None}

    def lines(self) -> list[str]:
        """The outcome for people."""
        told = [f"  x {result.name}: {result.error}" for result in self.results if result.error]
        told += [f"  warning: {result.name}: {result.warning}" for result in self.results if result.warning]
        counts = Counter(result.outcome for result in self.results)
        if counts["pending"] or (self.exit_code == UNCHECKED):
            return told
        if not self.plan.pending and not told:
            return []  # the plan has said it
        fetched = sum(result.fetched_bytes for result in self.results)
        words = ", ".join(f"{counts[word]} {'unchanged' if word == 'ok' else word}" for word in WORDS)
        return [*told, f"Reconcile complete: {words} ({size(fetched)} in {self.wall_s:.1f} s)."]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "exit_code": self.exit_code,
            "wall_s": round(self.wall_s, 3),
            "plan": self.plan.lines(),
            "models": [result.as_dict() for result in self.results],
        }
