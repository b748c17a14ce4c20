"""Boot, reload, drain. Signal handlers only enqueue; one task does the work in order; nothing here blocks the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from whisperd.config import Config, Loaded, cache_dir, diff
from whisperd.daemon import settings
from whisperd.daemon.leases import Leases
from whisperd.daemon.loader import Loader
from whisperd.daemon.memory import Leftovers, trim
from whisperd.daemon.open_model import ModelOpener
from whisperd.daemon.orders import carry_out, counted, report_members
from whisperd.daemon.service import DaemonService, State
from whisperd.daemon.systemd import Supervision
from whisperd.errors import CacheBusy, Draining, Error
from whisperd.logs import set_level
from whisperd.metrics.prometheus import Metrics
from whisperd.notify import Notifier
from whisperd.serving import wyoming
from whisperd.serving.http import create_app
from whisperd.serving.http.server import Server
from whisperd.serving.interface import Emit, ReconcileOrder
from whisperd.store.reconcile import Progress, Report, hold, reconcile, snapshots_without_network
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings as StoreSettings
from whisperd.store.settings import declared_models
from whisperd.store.sources import Wanted

log = logging.getLogger(__name__)

Waiter = asyncio.Future[Mapping[str, object]]

DRAIN_MARGIN_S = 5.0  # beyond server.shutdown_timeout_s: closing the engines
TEND_EVERY_S = 10.0
SIGNALS_TO_STOP = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """Owns everything that lives long. ``run`` returns when it was told to stop, and raises what kept it from booting.

    Args:
        loaded: the configuration to boot with.
        read_config: reads it again for a reload; raises ConfigError.
        environ: the environment.
        notifier: how systemd hears of it.
        sockets: where it listens for HTTP.
        wyoming_sockets: where it listens for the Wyoming protocol.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        read_config: Callable[[], Loaded],
        environ: Mapping[str, str],
        notifier: Notifier,
        sockets: Sequence[socket.socket],
        wyoming_sockets: Sequence[socket.socket] = (),
    ) -> None:
        self._read_config = read_config
        self._environ = environ
        self._notifier = notifier
        self._sockets = sockets
        self._wyoming_sockets = wyoming_sockets
        config = loaded.config
        self._state = State(loaded=loaded, cache_dir=str(cache_dir(config, environ)))
        self._seen = config
        self._leases = Leases()
        self._supervision = Supervision(
            notifier, self._state, self._leases, engine_stall_s=config.engine.stall_timeout_s
        )
        self._metrics = Metrics()
        work_dir = settings.conversions_dir(config, environ)
        self._loader = Loader(self._leases, ModelOpener(settings.engine_settings(config), work_dir, self._metrics))
        self._spool = settings.open_spool(config, environ)
        self._service = DaemonService(
            self._state,
            self._leases,
            self._metrics,
            self._spool,
            load_one=self._loader.load_one,
            reload=self._reload_and_wait,
            reconcile=self._reconcile,
        )
        self._app = create_app(self._service, settings.api_settings(config, environ), self._spool, self._metrics)
        self._server = Server(settings.server_settings(config), self._metrics)
        self._wyoming = wyoming.Listener(
            self._service,
            self._spool,
            settings.wyoming_settings(config, lambda: self._state.loaded.config.limits.audio_s),
            drain_s=config.server.shutdown_timeout_s,
            meter=self._metrics,
        )
        self._reloads: asyncio.Queue[Waiter | None] = asyncio.Queue()
        self._at_the_cache = asyncio.Lock()
        self._held: Sequence[int | None] = ()
        self._stop = asyncio.Event()
        self._cancel_store = threading.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT; raises Error when the default model cannot be served."""
        self._handle_signals()
        serving = asyncio.create_task(self._serve())
        working = asyncio.create_task(self._work())
        watching = asyncio.create_task(self._supervision.watch())
        tending = asyncio.create_task(self._tend())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(serving, _failure(working))
        finally:
            for task in (stopping, watching, tending, working):
                task.cancel()
            outcomes = await asyncio.gather(working, stopping, watching, tending, return_exceptions=True)
            await asyncio.to_thread(self._leases.close)
            self._service.close()
        _raise_failure(outcomes[0])

    async def _serve(self) -> None:
        await asyncio.gather(self._server.serve(self._app, self._sockets), self._wyoming.serve(self._wyoming_sockets))

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reloads.put_nowait, None)
        for number in SIGNALS_TO_STOP:
            loop.add_signal_handler(number, self._stop.set)

    async def _work(self) -> None:
        await self._boot()
        while True:
            waiters = [await self._reloads.get()]
            while not self._reloads.empty():  # a burst of signals is one reload
                waiters.append(self._reloads.get_nowait())
            await self._reload([waiter for waiter in waiters if waiter is not None])

    async def _boot(self) -> None:
        config = self._state.loaded.config
        async with self._at_the_cache:
            snapshots = await self._snapshots(config, all_or_nothing=False)
            await self._switch(config, snapshots)
        await self._catch_up()
        self._state.become("ready")
        self._supervision.ready()
        log.info("ready: %s", self._state.note)

    async def _catch_up(self) -> None:
        """Applies what was written during the boot: a ``systemctl reload`` in that time only waits for its end."""
        try:
            while (await asyncio.to_thread(self._read_config)).config != self._seen:
                log.info("the configuration has changed during the boot")
                await self._apply_changes()
        except Error as error:
            log.error("the configuration has changed during the boot and is not applied: %s", error)
            self._state.last_reload = _reload_result({}, error)

    async def _switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        self._supervision.loading(snapshots)
        await self._loader.switch(config, snapshots)
        self._hold(snapshots)

    def _hold(self, snapshots: Mapping[str, Path]) -> None:
        """No ``--prune`` of any process removes what is served, even if it was given another file to read."""
        before, self._held = self._held, [hold(path) for path in snapshots.values()]
        for handle in before:
            if handle is not None:
                os.close(handle)

    async def _reconcile(self, order: ReconcileOrder, tell: Emit) -> dict[str, object]:
        """Does what a client asks of the cache; models that have moved are switched to."""
        if self._stop.is_set():
            raise Draining("the daemon is stopping")
        if self._at_the_cache.locked():
            raise CacheBusy(f"the daemon itself works on the cache: {self._state.note}; try again when it is done")
        async with self._at_the_cache:
            config = self._state.loaded.config
            try:
                work = carry_out(order, config, self._environ, tell, self._supervision.fetched)
                report = await (work if order.check else counted(work, self._metrics))
            finally:
                self._supervision.fetching_ended()
            before = self._leases.served.snapshots
            moved = {name: path for name, path in report.snapshots.items() if before.get(name) not in (None, path)}
            if moved and not order.check:
                try:
                    await self._switch(config, {**before, **moved})
                finally:
                    self._supervision.serving()
        return report_members(report)

    async def _snapshots(self, config: Config, *, all_or_nothing: bool) -> Mapping[str, Path]:
        """Where the declared models are; asks the network only for what is not there."""
        wanted = declared_models(config)
        store = StoreSettings.from_config(config, self._environ)
        self._supervision.note("checking the cache")
        if not store.force:
            started_s = time.monotonic()
            found = await asyncio.to_thread(snapshots_without_network, wanted, store)
            if len(found) == len(wanted):
                self._state.problems = ()
                self._metrics.observe_reconcile("ok", time.monotonic() - started_s)
                return found
        report = await self._reconciled(wanted, store)
        failed = {result.name: result.error for result in report.results if result.error is not None}
        for name, error in failed.items():
            log.error("model %s: %s", name, error)
        default = wanted[0].name
        if failed and (all_or_nothing or default not in report.snapshots):
            raise failed.get(default) or next(iter(failed.values()))
        self._state.problems = tuple(f"{name}: {error}" for name, error in failed.items())
        return report.snapshots

    async def _reconciled(self, wanted: Sequence[Wanted], store: StoreSettings) -> Report:
        """Asks the Hub and fetches. That may take an hour: when bytes come, who waits for the boot is sent away."""
        loop = asyncio.get_running_loop()

        def on_progress(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._state.wait_no_more)
            self._supervision.fetched(progress)

        try:
            work = asyncio.to_thread(
                reconcile,
                wanted,
                store,
                on_plan=lambda plan: log.info("%s", "\n".join(plan_lines(plan))),
                on_progress=on_progress,
                cancel=self._cancel_store,
            )
            return await counted(work, self._metrics)
        finally:
            self._supervision.fetching_ended()
            self._state.wait_again()

    async def _reload_and_wait(self) -> Mapping[str, object]:
        if self._stop.is_set():
            raise Draining("the daemon is stopping")
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._reloads.put_nowait(waiter)
        return await waiter

    async def _reload(self, waiters: Sequence[Waiter]) -> None:
        self._notifier.reloading()
        self._state.become("reloading")
        outcome: Mapping[str, object] = {}
        failure: Error | None = None
        try:
            outcome = await self._apply_changes()
            log.info("reloaded: %s", outcome)
        except Error as error:
            failure = error
            log.error("reload failed, everything stays as it was: %s", error)
        except Exception as error:
            failure = Error(f"unexpected {type(error).__name__}: {error}")
            log.exception("reload failed, everything stays as it was")
        finally:
            self._state.last_reload = result = _reload_result(outcome, failure)
            self._state.become("ready")
            self._supervision.ready()
        self._metrics.count_reload(ok=failure is None)
        for waiter in waiters:
            _settle(waiter, result, failure)

    async def _apply_changes(self) -> dict[str, object]:
        old = self._state.loaded.config
        read = await asyncio.to_thread(self._read_config)
        self._seen = read.config
        config = _without_restart_options(old, read.config)
        async with self._at_the_cache:
            snapshots = await self._snapshots(config, all_or_nothing=True)
            await self._switch(config, snapshots)
        self._state.loaded = replace(read, config=config)
        self._state.needs_restart = tuple(change.key for change in diff(config, read.config))
        self._apply_limits(config)
        set_level(config.log_level)
        for warning in read.warnings:
            log.warning("%s", warning)
        return {
            "changed": [f"{change.key}: {change.old} -> {change.new}" for change in diff(old, config)],
            "needs_restart": list(self._state.needs_restart),
            "warnings": list(read.warnings),
        }

    def _apply_limits(self, config: Config) -> None:
        self._spool.upload_bytes = config.limits.upload_bytes
        self._spool.budget_bytes = config.limits.spool_bytes

    async def _tend(self) -> None:
        """Unloads models that nobody needs, and gives back what served requests have left in the memory."""
        leftovers = Leftovers()
        while True:
            idle_s = self._state.loaded.config.limits.model_idle_s
            if idle_s:
                await self._loader.unload_idle(idle_s)
            n_served = self._state.requests_done + self._state.requests_failed
            if leftovers.due(n_served=n_served, n_active=self._state.backlog.n_requests):
                await asyncio.to_thread(trim)
            await asyncio.sleep(min(TEND_EVERY_S, idle_s / 4) if idle_s else TEND_EVERY_S)

    async def _drain(self, serving: asyncio.Task[None], failure: Error | None) -> None:
        """Accepts no more and finishes what runs, within ``server.shutdown_timeout_s``."""
        self._stop.set()
        self._cancel_store.set()
        self._state.failure = str(failure) if failure else None
        self._state.become("stopping")
        self._notifier.stopping()
        self._notifier.extend_timeout(self._state.loaded.config.server.shutdown_timeout_s + DRAIN_MARGIN_S)
        self._supervision.note(f"stopping, {self._state.backlog.n_requests} requests to finish")
        log.info("%s", self._state.note)
        while not self._reloads.empty():
            waiter = self._reloads.get_nowait()
            if waiter is not None and not waiter.done():
                waiter.set_exception(Draining("the daemon is stopping"))
        self._server.stop()
        self._wyoming.stop()
        await serving


def _without_restart_options(old: Config, new: Config) -> Config:
    """What a reload may apply: options that need a restart keep their running values."""
    tables = {change.key.partition(".")[0] for change in diff(old, new) if change.reload == "restart"}
    return new.model_copy(update={name: getattr(old, name) for name in tables})


def _settle(waiter: Waiter, result: Mapping[str, object], failure: Error | None) -> None:
    """Answers a request for a reload, unless its client has gone."""
    if waiter.done():
        return
    if failure is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(failure)


def _reload_result(outcome: Mapping[str, object], failure: Error | None) -> Mapping[str, object]:
    return {"ok": failure is None, "at": time.time(), "error": str(failure) if failure else None, **outcome}


def _failure(working: asyncio.Task[None]) -> Error | None:
    """What ended the work, if it was an error that has words for users."""
    error = working.exception() if working.done() and not working.cancelled() else None
    return error if isinstance(error, Error) else None


def _raise_failure(outcome: object) -> None:
    if isinstance(outcome, Exception) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
