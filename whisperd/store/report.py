"""The plan and the outcome of a reconcile, as lines for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from whisperd.errors import Error, ExitCode, HubError
from whisperd.store.plan import FORCED, Action, CachePlan, Kind, Removal
from whisperd.store.wording import count, short, size

Outcome = Literal["ok", "downloaded", "updated", "repaired", "pending", "failed"]

SIGNS: Mapping[Kind, str] = {"ok": "=", "download": "+", "update": "~", "repair": "!", "blocked": "x"}
WORDS: tuple[Outcome, ...] = ("downloaded", "updated", "repaired", "ok", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The outcome of one model. ``path`` is a complete, verified snapshot or None."""

    name: str
    outcome: Outcome
    path: Path | None = None
    commit: str | None = None
    error: Error | None = None
    warning: str | None = None
    fetched_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The result as values for JSON."""
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
            return ExitCode.PENDING if pending else 0
        if any(result.outcome == "failed" for result in self.results):
            codes = {error.exit_code for error in errors}
            return codes.pop() if len(codes) == 1 else 1
        return ExitCode.UNCHECKED if any(isinstance(error, HubError) for error in errors) else 1

    @property
    def _prune_pending(self) -> bool:
        return self.plan.prune and len(self.removed) < len(self.plan.removals)

    @property
    def snapshots(self) -> Mapping[str, Path]:
        """The directories of the models that can be served."""
        return {result.name: result.path for result in self.results if result.path is not None}

    def lines(self) -> list[str]:
        """The outcome as lines of text."""
        said = {action.name for action in self.plan.actions if action.kind == "blocked"}  # by the plan
        failed = [result for result in self.results if result.error is not None]
        told = [f"  x {result.name}: {result.error}" for result in failed if result.name not in said]
        told += [f"  warning: {result.name}: {result.warning}" for result in self.results if result.warning]
        counts = Counter(result.outcome for result in self.results)
        if counts["pending"] or self._prune_pending or self.exit_code == ExitCode.UNCHECKED:
            return told
        if not self.plan.pending and not told:
            return []  # the plan has printed that as well
        fetched = sum(result.fetched_bytes for result in self.results)
        words = ", ".join(f"{counts[word]} {'unchanged' if word == 'ok' else word}" for word in WORDS)
        if self.removed:
            words += f", {len(self.removed)} removed"
        outcome = "incomplete" if failed else "complete"
        return [*told, f"Reconcile {outcome}: {words} ({size(fetched)} in {self.wall_s:.1f} s)."]

    def as_dict(self) -> dict[str, Any]:
        """The report as values for JSON."""
        return {
            "exit_code": self.exit_code,
            "wall_s": round(self.wall_s, 3),
            "plan": plan_lines(self.plan),
            "removed": [{"repo": removal.repo, "commit": removal.commit} for removal in self.removed],
            "models": [result.as_dict() for result in self.results],
        }


def plan_lines(plan: CachePlan) -> list[str]:
    """The plan as lines of text: a line for each model, and a summary."""
    repos = [action.repo for action in plan.actions] + [removal.repo for removal in plan.removals]
    repo_chars = max(map(len, repos), default=0)
    gone = [_removal_line(removal, repo_chars, plan.prune) for removal in plan.removals]
    return [*(_line(action, repo_chars) for action in plan.actions), *gone, _summary(plan)]


def _summary(plan: CachePlan) -> str:
    if not plan.pending:
        return f"No changes. The cache matches the {count(len(plan.actions), 'declared model')}."
    kinds = Counter(action.kind for action in plan.actions)
    todo = ", ".join(f"{kinds[kind]} to {kind}" for kind in ("download", "update", "repair"))
    removed = f", {len(plan.removals)} to remove" if plan.prune and plan.removals else ""
    blocked = f", {kinds['blocked']} blocked" if kinds["blocked"] else ""
    free = "" if plan.free_bytes is None else f", {size(plan.free_bytes)} free"
    return f"Plan: {todo}{removed}{blocked}; {size(plan.bytes)} to fetch{free}."


def _line(action: Action, repo_chars: int) -> str:
    return f"  {SIGNS[action.kind]} {action.repo:<{repo_chars}}  {_where(action)}{_what(action)}".rstrip()


def _removal_line(removal: Removal, repo_chars: int, prune: bool) -> str:
    kept = "" if prune else " (kept; --prune removes it)"
    return f"  - {removal.repo:<{repo_chars}}  {short(removal.commit)}  {removal.reason}, {size(removal.bytes)}{kept}"


def _where(action: Action) -> str:
    if action.revision is None:
        return ""
    if action.kind == "update":
        return f"{_revision(action)} {short(action.from_commit)} -> {short(action.to_commit)}  "
    commit = action.to_commit or action.from_commit
    return f"{_revision(action)}@{short(commit)}  " if commit else f"{_revision(action)}  "


def _revision(action: Action) -> str:
    """The branch or tag; a commit is not printed twice."""
    return "commit" if action.revision in (action.to_commit, action.from_commit) else str(action.revision)


def _what(action: Action) -> str:
    match action.kind:
        case "ok":
            return action.reason
        case "blocked":
            return f"blocked: {action.reason}"
        case "repair":
            return f"repair: {action.reason}; {_amount(action)}"
        case "download" | "update":
            return f"{'forced: ' if action.reason == FORCED else ''}{_amount(action)}"


def _amount(action: Action) -> str:
    """The size of the fetch: ``2 of 5 files, 484.1 MB``."""
    if not action.files:
        return "nothing to fetch"
    total = count(action.file_count, "file")
    some = len(action.files) < action.file_count
    rest = f" ({size(action.part_bytes)} of it are here from before)" if action.part_bytes else ""
    return f"{f'{len(action.files)} of {total}' if some else total}, {size(action.bytes)}{rest}"
