"""One reconcile, step by step."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from whisperd.errors import DiskFull, Error
from whisperd.reference import HubSource
from whisperd.store.apply import Applier
from whisperd.store.cache import Inspector, Repo, stamp_of
from whisperd.store.lockfile import Record, read_record, read_stamps, write_stamps
from whisperd.store.observe import Found, Observer
from whisperd.store.origins import Origin
from whisperd.store.plan import Action, CachePlan, Removal, Resolved, plan
from whisperd.store.preflight import room
from whisperd.store.progress import Progress, Tracker
from whisperd.store.report import Outcome, Result, Settings
from whisperd.store.sources import Wanted
from whisperd.store.staging import Staging

In = TypeVar("In")
Out = TypeVar("Out")

OUTCOMES: Mapping[str, Outcome] = {"download": "downloaded", "update": "updated", "repair": "repaired"}


class Run:
    """Looks, plans, does. The record and the stamps are changed under one lock and written after each model."""

    def __init__(self, settings: Settings, origin: Origin, on_progress: Callable[[Progress], None]) -> None:
        self._settings = settings
        self._origin = origin
        self._on_progress = on_progress
        self._record: Record = read_record(settings.cache_dir)
        self._inspector = Inspector(read_stamps(settings.cache_dir), verify=settings.verify)
        self._lock = threading.Lock()
        self._repo_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def observe(self, wanted: Sequence[Wanted]) -> list[Found]:
        """All models, several at a time: asking the Hub is waiting."""
        observer = Observer(self._settings.cache_dir, self._record, self._inspector)
        update = self._settings.update or self._settings.import_dir is not None
        force = self._settings.force
        return self._in_parallel(
            lambda one: observer.asked(one, self._origin.resolve, update=update, force=force), wanted
        )

    def plan(self, found: Sequence[Found]) -> CachePlan:
        """What has to be done."""
        cache_dir = self._settings.cache_dir
        return plan(
            [one.state for one in found],
            force=self._settings.force,
            room=room(cache_dir, self._settings.max_cache_bytes),
            contents=[Repo(cache_dir, repo_id).contents(owned) for repo_id, owned in self._record.owned.items()],
            prune=self._settings.prune,
        )

    def judge(self, found: Sequence[Found], chosen: CachePlan) -> list[Result]:
        """The results of looking only."""
        return [
            Result(
                name=action.name,
                outcome="ok" if action.kind in {"ok", "blocked"} else "pending",
                path=one.path,
                commit=action.to_commit,
                error=one.error or _blocked(action),
            )
            for one, action in zip(found, chosen.actions, strict=True)
        ]

    def apply(self, found: Sequence[Found], chosen: CachePlan) -> list[Result]:
        """The results of doing it."""
        tracker = Tracker(
            {action.name: action.total_bytes for action in chosen.actions if action.files}, self._on_progress
        )
        applier = Applier(cache_dir=self._settings.cache_dir, origin=self._origin, on_bytes=tracker.at)
        results = self._in_parallel(
            lambda pair: self._do(applier, *pair), list(zip(found, chosen.actions, strict=True))
        )
        write_stamps(self._settings.cache_dir, self._inspector.stamps)
        return results

    def prune(self, found: Sequence[Found], chosen: CachePlan, results: Sequence[Result]) -> tuple[Removal, ...]:
        """Does the removals of the plan, but for what a model that could not be renewed goes on with."""
        kept = {one.path for one, result in zip(found, results, strict=True) if result.outcome == "failed" and one.path}
        removed = []
        for removal in chosen.removals:
            repo = Repo(self._settings.cache_dir, removal.repo)
            if repo.snapshot(removal.commit) in kept:
                continue
            self._record.forget(removal.repo, removal.commit)
            self._record.write(self._settings.cache_dir)
            repo.remove(removal)
            removed.append(removal)
        return tuple(removed)

    def parts_to_keep(self, chosen: CachePlan, results: Sequence[Result]) -> set[Path]:
        """What has arrived of models that are not whole yet: the next run goes on from there."""
        return {
            Staging(self._settings.cache_dir, action.repo).part(file)
            for action, result in zip(chosen.actions, results, strict=True)
            if result.outcome == "failed"
            for file in action.files
        }

    def _in_parallel(self, do: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
        with ThreadPoolExecutor(self._settings.parallel, thread_name_prefix="reconcile") as pool:
            return list(pool.map(do, items))

    def _do(self, applier: Applier, found: Found, action: Action) -> Result:
        source, target = found.state.source, found.state.target
        error = _blocked(action)
        if error is not None:
            return Result(name=action.name, outcome="failed", path=found.path, error=found.error or error)
        if not isinstance(source, HubSource) or target is None:
            return Result(name=action.name, outcome="ok", path=found.path)
        warning = f"could not check for updates: {found.error}" if found.error else None
        if action.kind == "ok":
            self._remember(source, target)
            return Result(name=action.name, outcome="ok", path=found.path, commit=target.commit, warning=warning)
        try:
            path = self._applied(applier, action, source, target)
        except Error as failure:
            return Result(name=action.name, outcome="failed", path=found.path, error=failure)
        return Result(
            name=action.name,
            outcome=OUTCOMES[action.kind],
            path=path,
            commit=target.commit,
            warning=warning,
            fetched_bytes=action.bytes,
        )

    def _applied(self, applier: Applier, action: Action, source: HubSource, target: Resolved) -> Path:
        repo = Repo(self._settings.cache_dir, source.repo_id)
        with self._lock:
            one_at_a_time = self._repo_locks[source.repo_id]
        with one_at_a_time:
            is_new = not repo.snapshot(target.commit).exists()
            path = applier.apply(action, source, target)
        with self._lock:
            for file in action.files:
                self._inspector.stamps[str(repo.blob(file))] = stamp_of(repo.blob(file))
        self._remember(source, target, own=is_new)
        return path

    def _remember(self, source: HubSource, target: Resolved, *, own: bool = False) -> None:
        with self._lock:
            if own:
                self._record.own(source.repo_id, target.commit)
            if own or self._record.get(source) != target:
                self._record.put(source, target)
                self._record.write(self._settings.cache_dir)


def _blocked(action: Action) -> Error | None:
    return DiskFull(f"{action.repo}: {action.reason}") if action.kind == "blocked" else None
