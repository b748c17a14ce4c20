"""The daemon's work on the cache: at the boot, at a reload, and on request of a client.

Snapshots that are served are held: a ``--prune`` of any process leaves them alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from whisperd.config import Config
from whisperd.daemon.leases import Leases
from whisperd.daemon.loader import Loader
from whisperd.daemon.state import State
from whisperd.daemon.systemd import Supervision
from whisperd.errors import CacheBusy, Cancelled, Draining, Error, RequestError, SourceError
from whisperd.metrics.prometheus import Metrics
from whisperd.reference import parse
from whisperd.serving import schema
from whisperd.serving.interface import Emit, ReconcileOrder
from whisperd.store.plan import CachePlan
from whisperd.store.reconcile import Progress, Report, hold, reconcile, snapshots_without_network
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings, declared_models
from whisperd.store.sources import Wanted

log = logging.getLogger(__name__)


class Snapshots:
    """Finds, fetches and switches the snapshots of the declared models. Used on the event loop.

    Args:
        environ: the environment, for the cache's place and token.
        state: gets the models that could not be had.
        leases: the models, with the snapshots that are served.
        loader: loads them.
        supervision: shows the progress.
        metrics: counts reconciles.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        state: State,
        leases: Leases,
        loader: Loader,
        supervision: Supervision,
        metrics: Metrics,
    ) -> None:
        self._environ = environ
        self._state = state
        self._leases = leases
        self._loader = loader
        self._supervision = supervision
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._cancel = threading.Event()
        self._held: Sequence[int] = ()

    def cancel(self) -> None:
        """Cancels a reconcile that runs, and refuses further ones."""
        self._cancel.set()

    async def apply(self, config: Config, *, all_or_nothing: bool) -> None:
        """Makes the cache what ``config`` says, and serves it.

        Raises:
            Error: the default model, or with ``all_or_nothing`` any, cannot be had or loaded; what was served before
                is served still.
        """
        async with self._turn:
            snapshots = await self._find(config, all_or_nothing=all_or_nothing)
            await self._switch(config, snapshots)

    async def reconcile_on_request(self, order: ReconcileOrder, emit: Emit) -> schema.Report:
        """Does what a client asks of the cache, and switches to declared models whose snapshot is another one then.

        Returns the report. A cancelled task ends when the cache is left alone.

        Raises:
            Draining: the daemon is stopping.
            CacheBusy: the daemon works on the cache itself.
            RequestError: a requested model is no reference.
            StoreError: the cache cannot be worked on.
        """
        if self._cancel.is_set():
            raise Draining("the daemon is stopping")
        if self._turn.locked():
            raise CacheBusy(f"the daemon itself works on the cache: {self._state.note}; try again when it is done")
        async with self._turn:
            config = self._state.loaded.config
            try:
                work = self._carry_out(order, config, emit)
                report = await (work if order.check else self._measure(work))
            finally:
                self._supervision.clear_progress()
            if not order.check:
                await self._switch_moved(config, report.snapshots)
        return cast("schema.Report", {**report.as_dict(), "lines": report.lines()})

    async def _switch_moved(self, config: Config, found: Mapping[str, Path]) -> None:
        before = self._leases.served.snapshots
        declared = {table.served_name for table in config.models}
        moved = {name: path for name, path in found.items() if name in declared and before.get(name) != path}
        if not moved:
            return
        try:
            await self._switch(config, {**before, **moved})
        finally:
            self._supervision.note_serving()
        self._state.problems = tuple(
            problem for problem in self._state.problems if problem.partition(": ")[0] not in moved
        )

    async def _switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        self._supervision.note_loading(snapshots)
        held = [handle for handle in map(hold, snapshots.values()) if handle is not None]
        try:
            await self._loader.switch(config, snapshots)
        except asyncio.CancelledError:
            self._held = [*self._held, *held]  # the switch goes on in its thread; the next one lets go of these
            raise
        except Exception:
            _close(held)
            raise
        before, self._held = self._held, held
        _close(before)

    async def _find(self, config: Config, *, all_or_nothing: bool) -> Mapping[str, Path]:
        """The snapshots of the declared models; the network is used only for those that are not there."""
        wanted = declared_models(config)
        store = Settings.from_config(config, self._environ)
        self._supervision.note("checking the cache")
        if not store.force:
            started_s = time.monotonic()
            found = await asyncio.to_thread(snapshots_without_network, wanted, store)
            if len(found) == len(wanted):
                self._state.problems = ()
                self._metrics.observe_reconcile("ok", time.monotonic() - started_s)
                return found
        report = await self._fetch(wanted, store)
        failed = {result.name: result.error for result in report.results if result.error is not None}
        for name, error in failed.items():
            log.error("model %s: %s", name, error)
        default = wanted[0].name
        if failed and (all_or_nothing or default not in report.snapshots):
            raise failed.get(default) or next(iter(failed.values()))
        self._state.problems = tuple(f"{name}: {error}" for name, error in failed.items())
        return report.snapshots

    async def _fetch(self, wanted: Sequence[Wanted], store: Settings) -> Report:
        """Reconciles. That may take an hour: when bytes arrive, requests that wait for the boot get an error."""
        loop = asyncio.get_running_loop()

        def on_progress(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._state.refuse_waiting)
            self._supervision.note_progress(progress)

        try:
            work = asyncio.to_thread(
                reconcile,
                wanted,
                store,
                on_plan=lambda plan: log.info("%s", "\n".join(plan_lines(plan))),
                on_progress=on_progress,
                cancel=self._cancel,
            )
            return await self._measure(work)
        finally:
            self._supervision.clear_progress()
            self._state.resume_waiting()

    async def _carry_out(self, order: ReconcileOrder, config: Config, emit: Emit) -> Report:
        cancel = threading.Event()

        def on_progress(progress: Progress) -> None:
            self._supervision.note_progress(progress)
            emit("whisperd.progress", asdict(progress))

        running = asyncio.create_task(
            asyncio.to_thread(
                reconcile,
                _wanted(order, config),
                _ordered(order, Settings.from_config(config, self._environ)),
                on_plan=lambda plan: emit("whisperd.plan", _plan(plan)),
                on_progress=on_progress,
                cancel=cancel,
            )
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.wait([running])
            raise

    async def _measure(self, work: Awaitable[Report]) -> Report:
        """Awaits a reconcile, and counts its result and its time."""
        started_s = time.monotonic()
        try:
            report = await work
        except (Error, asyncio.CancelledError) as error:
            result = "failed" if isinstance(error, Error) and not isinstance(error, Cancelled) else "cancelled"
            self._metrics.observe_reconcile(result, time.monotonic() - started_s)
            raise
        fetched_bytes = {one.name: one.fetched_bytes for one in report.results if one.fetched_bytes}
        self._metrics.observe_reconcile(_result(report), time.monotonic() - started_s, fetched_bytes)
        return report


def _close(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)


def _ordered(order: ReconcileOrder, store: Settings) -> Settings:
    """The settings of the configuration, and what the order wants beyond them."""
    return replace(
        store,
        check=order.check,
        force=order.force or store.force,
        verify=order.verify or store.verify,
        update=order.update,
        prune=(order.prune or store.prune) and order.models is None,
    )


def _wanted(order: ReconcileOrder, config: Config) -> Sequence[Wanted]:
    """The models of an order: declared ones by name or reference, and any other reference."""
    declared = declared_models(config)
    if order.models is None:
        return declared
    known = {name: one for one in declared for name in (one.name, str(one.source))}
    try:
        return [known.get(name) or Wanted(name=name, source=parse(name)) for name in order.models]
    except SourceError as error:
        raise RequestError(f"not a declared model, and not a reference: {error}", param="models") from error


def _plan(plan: CachePlan) -> schema.Plan:
    return {"lines": plan_lines(plan), "pending": plan.pending}


def _result(report: Report) -> str:
    """One of the results that the metrics know."""
    if any(one.outcome == "failed" for one in report.results):
        return "failed"
    return "unchecked" if any(one.warning for one in report.results) else "ok"
