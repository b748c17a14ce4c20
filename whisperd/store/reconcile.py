"""The cache is made what the file says: observe, plan, tell, do, verify, switch, remember."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from whisperd.errors import StoreError
from whisperd.reference import HubSource
from whisperd.store.cache import OWN_DIR, Inspector, hold
from whisperd.store.hub import Connection
from whisperd.store.lockfile import read_record, read_stamps, write_stamps
from whisperd.store.manifest import ExportedOrigin, export_model
from whisperd.store.observe import Observer
from whisperd.store.origins import HubOrigin, Nowhere, Origin
from whisperd.store.plan import CachePlan
from whisperd.store.preflight import become_owner, one_writer, preflight
from whisperd.store.progress import Progress
from whisperd.store.report import Report, Result, Settings
from whisperd.store.run import Run
from whisperd.store.sources import Wanted
from whisperd.store.staging import clear_staging

__all__ = [
    "Progress",
    "Report",
    "Result",
    "Settings",
    "become_owner",
    "export",
    "hold",
    "reconcile",
    "snapshots_without_network",
]


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
