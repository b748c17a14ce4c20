"""Reconciles the cache with the configuration: observe, plan, print, fetch, verify, switch, record."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from whisperd.errors import DiskFull, Error, StoreError
from whisperd.reference import HubSource
from whisperd.store.apply import Applier
from whisperd.store.cache import OWN_DIR, Repo, Staging, clean_cache, clear_staging, hold
from whisperd.store.export import export_model
from whisperd.store.hub import Connection, disk_error
from whisperd.store.lockfile import Record, read_record
from whisperd.store.observe import Found, Observer
from whisperd.store.origins import ExportedOrigin, HubOrigin, Nowhere, Origin
from whisperd.store.plan import Action, CachePlan, Removal, Resolved, plan
from whisperd.store.preflight import Holder, become_owner, one_writer, preflight, room
from whisperd.store.progress import Progress, Tracker, progress_from
from whisperd.store.report import Outcome, Report, Result
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted
from whisperd.store.verify import Inspector, read_stamps, write_stamps

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

log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

OUTCOMES: Mapping[str, Outcome] = {"ok": "ok", "download": "downloaded", "update": "updated", "repair": "repaired"}


def reconcile(
    wanted: Sequence[Wanted],
    settings: Settings,
    *,
    on_plan: Callable[[CachePlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_wait: Callable[[str], None] = lambda _: None,
    cancel: threading.Event | None = None,
    origin: Origin | None = None,
) -> Report:
    """Brings the cache into the declared state, or with ``settings.check`` only says what would be done.

    A model that fails does not keep the others from being done.

    Args:
        wanted: the declared models.
        settings: how to reconcile.
        on_plan: called once, before anything is done.
        on_progress: called from several threads; while another reconcile is waited for, with the progress of that one.
        on_wait: called once with who works on the cache, if that has to be waited for.
        cancel: ends the run when it is set.
        origin: asked for models; None means what the settings say: a directory, the Hub, or nobody.

    Raises:
        CacheBusy: another reconcile works on this cache, and makes no progress or is not to be waited for.
        StoreError: the cache cannot be used at all.
        Cancelled: ``cancel`` was set; nothing is half done.
    """
    started_s = time.monotonic()
    cancel = cancel or threading.Event()
    if settings.check:
        with tempfile.TemporaryDirectory(prefix="whisperd-") as state_dir:
            run = Run(settings, origin or _origin(settings, Path(state_dir), cancel), on_progress, cancel)
            found = run.observe(wanted)
            chosen = run.plan(found)
            on_plan(chosen)
            return Report(plan=chosen, results=tuple(run.judge(found, chosen)), wall_s=time.monotonic() - started_s)
    preflight(settings.cache_dir)
    waiting = _Waiting(settings.cache_dir, on_progress, on_wait)
    with one_writer(
        settings.cache_dir, patience_s=settings.lock_timeout_s, cancel=cancel, on_wait=waiting.tell
    ) as lock:

        def publish(progress: Progress) -> None:
            lock.publish(asdict(progress))
            on_progress(progress)

        state_dir = str(settings.cache_dir / OWN_DIR / "hub")
        run = Run(settings, origin or _origin(settings, Path(state_dir), cancel), publish, cancel)
        run.clean(wanted)
        found = run.observe(wanted)
        chosen = run.plan(found)
        on_plan(chosen)
        results = run.confirm(wanted, run.apply(found, chosen))
        removed = run.prune(found, chosen, results) if settings.prune else ()
        run.clear_staging(chosen, results)
    return Report(plan=chosen, results=tuple(results), removed=removed, wall_s=time.monotonic() - started_s)


def snapshots_without_network(wanted: Sequence[Wanted], settings: Settings) -> dict[str, Path]:
    """The models that are complete and verified on this machine, by name; nobody is asked, no model is changed.

    Needs no lock. Works on a cache that cannot be written to and on one that another tool has filled; a model of which
    it cannot be known here whether all files are there is left out if it lacks a file that others have.
    """
    inspector = Inspector(read_stamps(settings.cache_dir), verify=settings.verify)
    before = dict(inspector.stamps)
    observer = Observer(settings.cache_dir, read_record(settings.cache_dir), inspector)
    found = {
        one.name: observer.known(one).path
        for one in wanted
        if not isinstance(one.source, HubSource) or observer.is_usable(one.source)
    }
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
        exported.append(export_model(one.source, entry.resolved, found.path, directory))
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


class _Waiting:
    """Shows whom a run waits for, and how far that one is."""

    def __init__(
        self, cache_dir: Path, on_progress: Callable[[Progress], None], on_wait: Callable[[str], None]
    ) -> None:
        self._cache_dir = cache_dir
        self._on_progress = on_progress
        self._on_wait = on_wait
        self._is_told = False

    def tell(self, holder: Holder | None) -> None:
        """Passes on what the holder of the lock has published."""
        if not self._is_told:
            self._is_told = True
            text = f"waiting for another reconcile ({holder or 'unknown'}), which works on {self._cache_dir}"
            log.info("%s", text)
            self._on_wait(text)
        if holder is not None and (progress := progress_from(holder.progress)) is not None:
            self._on_progress(progress)


class Run:
    """One reconcile. The record and the stamps are changed under one lock; the record is written after each model."""

    def __init__(
        self, settings: Settings, origin: Origin, on_progress: Callable[[Progress], None], cancel: threading.Event
    ) -> None:
        self._settings = settings
        self._cancel = cancel
        self._cache_dir = settings.cache_dir
        self._origin = origin
        self._on_progress = on_progress
        self._record: Record = read_record(settings.cache_dir)
        self._inspector = Inspector(read_stamps(settings.cache_dir), verify=settings.verify)
        self._observer = Observer(settings.cache_dir, self._record, self._inspector)
        self._lock = threading.Lock()
        self._repo_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def clean(self, wanted: Sequence[Wanted]) -> None:
        """Removes the scratch files of a run that was killed."""
        clean_cache(self._cache_dir)
        declared = {one.source.repo_id for one in wanted if isinstance(one.source, HubSource)}
        for repo_id in declared | self._record.owned.keys():
            self._repo(repo_id).clean()

    def observe(self, wanted: Sequence[Wanted]) -> list[Found]:
        """Looks at all models, several at a time: asking the Hub is waiting."""
        update = self._settings.update or self._settings.import_dir is not None
        force = self._settings.force
        return self._in_parallel(
            lambda one: self._observer.asked(one, self._origin.resolve, update=update, force=force), wanted
        )

    def plan(self, found: Sequence[Found]) -> CachePlan:
        """Says what has to be done."""
        return plan(
            [one.state for one in found],
            force=self._settings.force,
            room=room(self._cache_dir, self._settings.max_cache_bytes),
            contents=[self._repo(repo_id).contents(owned) for repo_id, owned in self._record.owned.items()],
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
                warning=one.warning,
            )
            for one, action in zip(found, chosen.actions, strict=True)
        ]

    def apply(self, found: Sequence[Found], chosen: CachePlan) -> list[Result]:
        """Does the actions of a plan."""
        total_bytes = {action.name: action.total_bytes for action in chosen.actions if action.files}
        tracker = Tracker(total_bytes, self._on_progress)
        pairs = list(zip(found, chosen.actions, strict=True))
        results = self._in_parallel(lambda pair: self._do(tracker, *pair), pairs)
        write_stamps(self._cache_dir, self._inspector.stamps)
        return results

    def confirm(self, wanted: Sequence[Wanted], results: Sequence[Result]) -> list[Result]:
        """Looks once more at what is complete, and repairs what vanished while other models were fetched.

        Another tool may clean the cache at any time; nothing is reported as complete that is not there in the end.
        """
        gone = [one for one, result in zip(wanted, results, strict=True) if not self._is_there(one, result)]
        if not gone:
            return list(results)
        found = [self._observer.known(one) for one in gone]
        chosen = plan([one.state for one in found], room=room(self._cache_dir, self._settings.max_cache_bytes))
        repaired = {result.name: result for result in self.apply(found, chosen)}
        return [_merged(result, repaired.get(result.name)) for result in results]

    def prune(self, found: Sequence[Found], chosen: CachePlan, results: Sequence[Result]) -> tuple[Removal, ...]:
        """Does the removals of the plan, but for what a model that could not be renewed goes on with."""
        kept = {one.path for one, result in zip(found, results, strict=True) if result.outcome == "failed" and one.path}
        removed = []
        for removal in chosen.removals:
            repo = self._repo(removal.repo)
            if repo.snapshot(removal.commit) in kept:
                continue
            self._record.forget(removal.repo, removal.commit)
            self._record.write(self._cache_dir)
            repo.remove(removal)
            removed.append(removal)
        return tuple(removed)

    def clear_staging(self, chosen: CachePlan, results: Sequence[Result]) -> None:
        """Removes the parts, but for those of models that are not whole yet: the next run goes on from there."""
        keep = {
            Staging(self._cache_dir, self._repo(action.repo)).part(file)
            for action, result in zip(chosen.actions, results, strict=True)
            if result.outcome == "failed"
            for file in action.files
        }
        repos = [self._repo(action.repo) for action in chosen.actions if action.revision is not None]
        clear_staging(self._cache_dir, keep, repos)

    def _repo(self, repo_id: str) -> Repo:
        return Repo(self._cache_dir, repo_id)

    def _in_parallel(self, do: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
        with ThreadPoolExecutor(self._settings.parallel, thread_name_prefix="reconcile") as pool:
            try:
                return list(pool.map(do, items))
            except BaseException:  # Ctrl-C, say: the pool waits for its threads
                self._cancel.set()
                raise

    def _is_there(self, wanted: Wanted, result: Result) -> bool:
        if not isinstance(wanted.source, HubSource) or result.path is None:
            return True
        entry = self._observer.entry(wanted.source)
        if entry is None or entry.resolved.commit != result.path.name:
            return result.path.is_dir()
        return self._inspector.is_whole(self._repo(wanted.source.repo_id), entry.resolved)

    def _do(self, tracker: Tracker, found: Found, action: Action) -> Result:
        source, target = found.state.source, found.state.target
        error = _blocked(action)
        if error is not None:
            return Result(name=action.name, outcome="failed", path=found.path, error=found.error or error)
        if not isinstance(source, HubSource) or target is None:
            return Result(name=action.name, outcome="ok", path=found.path)
        try:
            if action.kind == "ok":
                self._remember(source, target)
            else:
                self._apply_one(tracker, action, source, target)
        except Error as failure:
            return Result(name=action.name, outcome="failed", path=found.path, error=failure)
        return Result(
            name=action.name,
            outcome=OUTCOMES[action.kind],
            path=self._repo(source.repo_id).snapshot(target.commit),
            commit=target.commit,
            warning=_warning(found),
            fetched_bytes=action.bytes,
        )

    def _apply_one(self, tracker: Tracker, action: Action, source: HubSource, target: Resolved) -> None:
        repo = self._repo(source.repo_id)
        with self._lock:
            one_at_a_time = self._repo_locks[source.repo_id]
        with one_at_a_time:
            is_new = not repo.snapshot(target.commit).exists()
            applier = Applier(
                repo=repo,
                staging=Staging(self._cache_dir, repo),
                origin=self._origin,
                inspector=self._inspector,
                on_bytes=tracker.at,
            )
            applier.apply(action, source, target)
        self._remember(source, target, own=is_new)

    def _remember(self, source: HubSource, target: Resolved, *, own: bool = False) -> None:
        """Records a commit, and lets a ref name it: the cleaning of other tools spares it."""
        try:
            with self._lock:
                if own:
                    self._record.own(source.repo_id, target.commit)
                if own or self._record.get(source) != target:
                    self._record.put(source, target)
                    self._record.write(self._cache_dir)
                self._repo(source.repo_id).keep(self._record.commits(source.repo_id))
        except OSError as error:
            raise disk_error(error, self._cache_dir) from error


def _blocked(action: Action) -> Error | None:
    return DiskFull(f"{action.repo}: {action.reason}") if action.kind == "blocked" else None


def _merged(result: Result, repaired: Result | None) -> Result:
    """A result with what came of repairing the model afterwards."""
    if repaired is None:
        return result
    if result.error is not None:  # of an update, say: what was repaired is the commit that goes on serving
        return replace(result, path=repaired.path)
    return replace(repaired, fetched_bytes=result.fetched_bytes + repaired.fetched_bytes)


def _warning(found: Found) -> str | None:
    unchecked = f"could not check for updates: {found.error}" if found.error else None
    return "; ".join(filter(None, (unchecked, found.warning))) or None
