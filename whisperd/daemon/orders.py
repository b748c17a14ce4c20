"""A reconcile that a client has asked for: the files keep their owner, and the daemon knows what changed.

And what is counted of each, whoever asked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace

from whisperd.config import Config
from whisperd.errors import Cancelled, Error, RequestError, SourceError
from whisperd.metrics.prometheus import Metrics
from whisperd.reference import parse
from whisperd.serving.interface import Emit, ReconcileOrder
from whisperd.store.plan import CachePlan
from whisperd.store.reconcile import Progress, Report, reconcile
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings, declared_models
from whisperd.store.sources import Wanted


async def carry_out(
    order: ReconcileOrder,
    config: Config,
    environ: Mapping[str, str],
    tell: Emit,
    on_progress: Callable[[Progress], None],
) -> Report:
    """Does it in a thread; a cancelled task waits until the cache is left alone.

    Raises:
        RequestError: a model that is asked for is no reference.
        StoreError: the cache cannot be worked on.
    """
    store = Settings.from_config(config, environ)
    chosen = replace(
        store,
        check=order.check,
        force=order.force or store.force,
        verify=order.verify or store.verify,
        update=order.update,
        prune=(order.prune or store.prune) and order.models is None,
    )
    cancel = threading.Event()

    def fetched(progress: Progress) -> None:
        on_progress(progress)
        tell("whisperd.progress", _progress(progress))

    running = asyncio.create_task(
        asyncio.to_thread(
            reconcile,
            _wanted(order, config),
            chosen,
            on_plan=lambda plan: tell("whisperd.plan", _plan(plan)),
            on_progress=fetched,
            cancel=cancel,
        )
    )
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancel.set()
        await asyncio.wait([running])
        raise


async def counted(work: Awaitable[Report], metrics: Metrics) -> Report:
    """Does the work and counts how it went."""
    started_s = time.monotonic()
    try:
        report = await work
    except (Error, asyncio.CancelledError) as error:
        result = "failed" if isinstance(error, Error) and not isinstance(error, Cancelled) else "cancelled"
        metrics.observe_reconcile(result, time.monotonic() - started_s)
        raise
    fetched_bytes = {one.name: one.fetched_bytes for one in report.results if one.fetched_bytes}
    metrics.observe_reconcile(_outcome(report), time.monotonic() - started_s, fetched_bytes)
    return report


def _outcome(report: Report) -> str:
    if any(one.outcome == "failed" for one in report.results):
        return "failed"
    return "unchecked" if any(one.warning for one in report.results) else "ok"


def report_members(report: Report) -> dict[str, object]:
    """A report as the last event has it."""
    return {**report.as_dict(), "lines": report.lines()}


def _wanted(order: ReconcileOrder, config: Config) -> Sequence[Wanted]:
    declared = declared_models(config)
    if order.models is None:
        return declared
    known = {name: one for one in declared for name in (one.name, str(one.source))}
    try:
        return [known.get(name) or Wanted(name=name, source=parse(name)) for name in order.models]
    except SourceError as error:
        raise RequestError(f"not a declared model, and not a reference: {error}", param="models") from error


def _plan(plan: CachePlan) -> dict[str, object]:
    return {"lines": plan_lines(plan), "pending": plan.pending}


def _progress(progress: Progress) -> dict[str, object]:
    return asdict(progress)
