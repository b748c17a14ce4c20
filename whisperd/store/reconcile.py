"""Reconciles the cache with the configuration: observe, plan, print, fetch, verify, switch, record."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from whisperd.errors import DiskFull, Error, StoreError
from whisperd.reference import HubSource
from whisperd.store.apply import Applier
from whisperd.store.cache import OWN_DIR, Repo, Staging, clear_staging, hold
from whisperd.store.export import export_model
from whisperd.store.hub import Connection
from whisperd.store.lockfile import Record, read_record
from whisperd.store.observe import Found, Observer
from whisperd.store.origins import ExportedOrigin, HubOrigin, Nowhere, Origin
from whisperd.store.plan import Action, CachePlan, Removal, Resolved, plan
from whisperd.store.preflight import become_owner, one_writer, preflight, room
from whisperd.store.progress import Progress, Tracker
from whisperd.store.report import Outcome, Report, Result
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted
from whisperd.store.verify import Inspector, read_stamps, stamp_of, write_stamps

__all__ = [
    "Progress",
    "Report",
    "Result",
    "become_owner",
    "export",
    "hold",
    "reconcile",
    "snapshots_without_network",
]

In = TypeVar("In")
Out = TypeVar("Out")

OUTCOMES: Mapping[str, Outcome] = {"download": "downloaded", "update": "updated", "repair": "repaired"}


def reconcile(
    wanted: Sequence[Wanted],
    settings: Settings,
    *,
    on_plan: Callable[[CachePlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    cancel: threading.Event | None = None,
    origin: Origin | None = None,
) -> Report:
    """Brings the cache into the declared state, or with ``settings.check`` only says what would be done.

    A model that fails does not keep the others from being done. ``on_progress`` is called from several threads.
    ``origin`` is asked for models; None means what the settings say: a directory, the Hub, or nobody.

    Raises:
        CacheBusy: another reconcile works on this cache.
        StoreError: the cache cannot be used at all.
        Cancelled: ``cancel`` was set; nothing is half done.
    """
    started_s = time.monotonic()
    with ExitStack() as stack:
        if settings.check:
            state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whisperd-")))
        else:
            preflight(settings.cache_dir)
            stack.enter_context(one_writer(settings.cache_dir))
            state_dir = settings.cache_dir / OWN_DIR / "hub"
        chosen_origin = origin or _origin(settings, state_dir, cancel or threading.Event())
        run = Run(settings, chosen_origin, on_progress)
        found = run.observe(wanted)
        chosen = run.plan(found)
        on_plan(chosen)
        if settings.check:
            return Report(plan=chosen, results=tuple(run.judge(found, chosen)), wall_s=time.monotonic() - started_s)
        results = run.apply(found, chosen)
        removed = run.prune(found, chosen, results) if settings.prune else ()
        clear_staging(settings.cache_dir, keep=run.parts_to_keep(chosen, results))
    return Report(plan=chosen, results=tuple(results), removed=removed, wall_s=time.monotonic() - started_s)


def snapshots_without_network(wanted: Sequence[Wanted], settings: Settings) -> dict[str, Path]:
    """The models that are complete and verified on this machine, by name; nobody is asked, nothing is changed.

    Works on a cache that cannot be written to and on one that another tool has filled.
    """
    inspector = Inspector(read_stamps(settings.cache_dir), verify=settings.verify)
    before = dict(inspector.stamps)
    observer = Observer(settings.cache_dir, read_record(settings.cache_dir), inspector)
    found = {one.name: observer.known(one).path for one in wanted}
    if inspector.stamps != before:
        write_stamps(settings.cache_dir, inspector.stamps)
    return {name: path for name, path in found.items() if path is not None}


def export(wanted: Sequence[Wanted], settings: Settings, directory: Path) -> list[Path]:
    """Copies the models, which must be complete in the cache, to ``directory``; returns where each has gone.

    Raises:
        StoreError: one is not complete, or could not be copied.
    """
    record = read_record(settings.cache_dir)
    observer = Observer(settings.cache_dir, record, Inspector(read_stamps(settings.cache_dir)))
    exported = []
    for one in wanted:
        found = observer.known(one)
        entry = observer.entry(one.source) if isinstance(one.source, HubSource) else None
        if not isinstance(one.source, HubSource) or entry is None or found.path is None:
            reason = (
                "it is not complete in the cache" if isinstance(one.source, HubSource) else "it is not from the Hub"
            )
            raise StoreError(f"{one.name} cannot be exported: {reason}")
        exported.append(export_model(one.source, entry, found.path, directory))
    return exported


def _origin(settings: Settings, state_dir: Path, cancel: threading.Event) -> Origin:
    if settings.import_dir is not None:
        return ExportedOrigin(settings.import_dir)
    if settings.offline:
        return Nowhere()
    connection = Connection(
        endpoint=settings.endpoint,
        token=settings.token,
        state_dir=state_dir,
        metadata_timeout_s=settings.metadata_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
        retry_wait_s=settings.retry_wait_s,
    )
    return HubOrigin(connection=connection, cancel=cancel)


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
