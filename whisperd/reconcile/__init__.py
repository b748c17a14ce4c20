"""The cache is made what the file says: observe, plan, tell, do, verify, switch, remember."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from whisperd.errors import DiskFull, Error, HubUnreachable
from whisperd.hub import Connection, resolve
from whisperd.plan import Action, CachePlan, Resolved, plan
from whisperd.reconcile.apply import Applier
from whisperd.reconcile.cache import (
    MARGIN_BYTES,
    OWN_DIR,
    Inspector,
    Repo,
    clear_staging,
    free_bytes,
    one_writer,
    preflight,
    stamp_of,
)
from whisperd.reconcile.observe import Found, Observer, refuse_offline
from whisperd.reconcile.record import Record, read_record, read_stamps, write_stamps
from whisperd.reconcile.report import Outcome, Progress, Report, Result, Settings
from whisperd.sources import HubSource, Wanted

__all__ = ["Progress", "Report", "Result", "Settings", "reconcile", "snapshots_without_network"]

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
) -> Report:
    """Brings the cache into the declared state, or with ``settings.check`` only says what would be done.

    A model that fails does not keep the others from being done. ``on_progress`` is called from several threads.

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
            clear_staging(settings.cache_dir)
            stack.callback(clear_staging, settings.cache_dir)
            state_dir = settings.cache_dir / OWN_DIR / "hub"
        run = _Run(settings, state_dir, on_progress, cancel or threading.Event())
        found = run.observe(wanted)
        chosen = _planned(found, settings)
        on_plan(chosen)
        results = run.judge(found, chosen) if settings.check else run.apply(found, chosen)
    return Report(plan=chosen, results=tuple(results), wall_s=time.monotonic() - started_s)


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


def _planned(found: Sequence[Found], settings: Settings) -> CachePlan:
    return plan(
        [one.state for one in found],
        force=settings.force,
        free_bytes=free_bytes(settings.cache_dir),
        margin_bytes=MARGIN_BYTES,
    )


class _Run:
    """One reconcile. The record and the stamps are changed under one lock and written after each model."""

    def __init__(
        self, settings: Settings, state_dir: Path, on_progress: Callable[[Progress], None], cancel: threading.Event
    ) -> None:
        self._settings = settings
        self._cancel = cancel
        self._on_progress = on_progress
        self._connection = Connection(
            endpoint=settings.endpoint,
            token=settings.token,
            state_dir=state_dir,
            metadata_timeout_s=settings.metadata_timeout_s,
            stall_timeout_s=settings.stall_timeout_s,
        )
        self._record: Record = read_record(settings.cache_dir)
        self._inspector = Inspector(read_stamps(settings.cache_dir), verify=settings.verify)
        self._lock = threading.Lock()

    def observe(self, wanted: Sequence[Wanted]) -> list[Found]:
        """All models, several at a time: asking the Hub is waiting."""
        observer = Observer(self._settings.cache_dir, self._record, self._inspector)
        update, force = self._settings.update, self._settings.force
        return self._in_parallel(lambda one: observer.asked(one, self._resolve, update=update, force=force), wanted)

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
        results = self._in_parallel(lambda pair: self._do(*pair), list(zip(found, chosen.actions, strict=True)))
        write_stamps(self._settings.cache_dir, self._inspector.stamps)
        return results

    def _in_parallel(self, do: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
        with ThreadPoolExecutor(self._settings.parallel, thread_name_prefix="reconcile") as pool:
            return list(pool.map(do, items))

    def _resolve(self, source: HubSource) -> Resolved:
        if self._settings.offline:
            return refuse_offline(source)
        return resolve(source, self._connection, self._cancel)

    def _do(self, found: Found, action: Action) -> Result:
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
            path = self._applied(action, source, target)
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

    def _applied(self, action: Action, source: HubSource, target: Resolved) -> Path:
        if self._settings.offline and action.files:
            raise HubUnreachable(f"{source}: {len(action.files)} files have to be fetched, and offline is set")
        applier = Applier(
            cache_dir=self._settings.cache_dir,
            connection=self._connection,
            on_progress=self._on_progress,
            cancel=self._cancel,
        )
        path = applier.apply(action, source, target)
        with self._lock:
            repo = Repo(self._settings.cache_dir, source.repo_id)
            for file in action.files:
                self._inspector.stamps[str(repo.blob(file))] = stamp_of(repo.blob(file))
        self._remember(source, target)
        return path

    def _remember(self, source: HubSource, target: Resolved) -> None:
        with self._lock:
            if self._record.get(source) != target:
                self._record.put(source, target)
                self._record.write(self._settings.cache_dir)


def _blocked(action: Action) -> Error | None:
    return DiskFull(f"{action.repo}: {action.reason}") if action.kind == "blocked" else None
