"""Boot, reload, drain. Signal handlers only enqueue; one task does the work in order; nothing here blocks the loop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from whisperd.config import Config, Loaded, cache_dir, diff
from whisperd.daemon import settings
from whisperd.daemon.front_ends import FrontEnds
from whisperd.daemon.leases import Leases
from whisperd.daemon.loader import Loader
from whisperd.daemon.memory import Leftovers, trim
from whisperd.daemon.open_model import ModelOpener
from whisperd.daemon.service import DaemonService
from whisperd.daemon.snapshots import Snapshots
from whisperd.daemon.state import State
from whisperd.daemon.status import Status
from whisperd.daemon.systemd import Supervision
from whisperd.daemon.transcriber import Transcriber
from whisperd.errors import Draining, Error
from whisperd.logs import set_level
from whisperd.metrics.prometheus import Metrics
from whisperd.notify import Notifier
from whisperd.serving.schema import Changes, Reload
from whisperd.speech.isolation import IsolatedDecoder

log = logging.getLogger(__name__)

Waiter = asyncio.Future[Reload]

DRAIN_MARGIN_S = 5.0  # beyond server.shutdown_timeout_s: closing the engines
TEND_EVERY_S = 10.0
SIGNALS_TO_STOP = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """Owns all long-lived objects. ``run`` returns after a signal to stop, and raises what ended the boot.

    Args:
        loaded: the configuration to boot with.
        read_config: reads it again for a reload; raises ConfigError.
        environ: the environment.
        notifier: sends to systemd.
        sockets: where to listen for HTTP.
        wyoming_sockets: where to listen for the Wyoming protocol.
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
        config = loaded.config
        self._read_config = read_config
        self._notifier = notifier
        self._sockets = (sockets, wyoming_sockets)
        self._seen = config
        self._state = State(loaded=loaded, cache_dir=str(cache_dir(config, environ)))
        self._metrics = Metrics()
        self._spool = settings.open_spool(config, environ)
        self._leases = Leases()
        status = Status(self._state, self._leases, self._spool)
        self._supervision = Supervision(
            notifier, self._state, status, self._leases, engine_stall_s=config.engine.stall_timeout_s
        )
        work_dir = settings.conversions_dir(config, environ)
        self._loader = Loader(self._leases, ModelOpener(settings.engine_settings(config), work_dir, self._metrics))
        self._snapshots = Snapshots(environ, self._state, self._leases, self._loader, self._supervision, self._metrics)
        self._decoder = IsolatedDecoder(environ)
        self._transcriber = Transcriber(self._state, self._leases, self._metrics, self._decoder, self._loader.load_one)
        service = DaemonService(
            self._state,
            status,
            self._leases,
            self._transcriber,
            self._metrics,
            reload=self._reload_and_wait,
            reconcile=self._snapshots.reconcile_on_request,
        )
        self._front_ends = FrontEnds(
            service,
            self._spool,
            config,
            environ,
            self._metrics,
            audio_s=lambda: self._state.loaded.config.limits.audio_s,
        )
        self._reloads: asyncio.Queue[Waiter | None] = asyncio.Queue()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT; raises Error when the default model cannot be served."""
        self._handle_signals()
        self._decoder.start()
        serving = asyncio.create_task(self._front_ends.serve(*self._sockets))
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
            self._transcriber.close()
            await asyncio.to_thread(self._decoder.close)
        _raise_failure(outcomes[0])

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
        await self._snapshots.apply(self._state.loaded.config, all_or_nothing=False)
        await self._catch_up()
        self._state.enter("ready")
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
            self._state.last_reload = _reload_result(None, error)

    async def _reload_and_wait(self) -> Reload:
        if self._stop.is_set():
            raise Draining("the daemon is stopping")
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._reloads.put_nowait(waiter)
        return await waiter

    async def _reload(self, waiters: Sequence[Waiter]) -> None:
        self._notifier.reloading()
        self._state.enter("reloading")
        outcome: Changes | None = None
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
            self._state.enter("ready")
            self._supervision.ready()
        self._metrics.count_reload(ok=failure is None)
        for waiter in waiters:
            _settle(waiter, result, failure)

    async def _apply_changes(self) -> Changes:
        old = self._state.loaded.config
        read = await asyncio.to_thread(self._read_config)
        self._seen = read.config
        config = _without_restart_options(old, read.config)
        await self._snapshots.apply(config, all_or_nothing=True)
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
        """Unloads idle models, and returns to the system the memory that served requests have freed."""
        leftovers = Leftovers()
        while True:
            idle_s = self._state.loaded.config.limits.model_idle_s
            if idle_s:
                await self._loader.unload_idle(idle_s)
            n_served = self._state.totals.done + self._state.totals.failed
            if leftovers.due(n_served=n_served, n_active=self._state.admissions.n_requests):
                await asyncio.to_thread(trim)
            await asyncio.sleep(min(TEND_EVERY_S, idle_s / 4) if idle_s else TEND_EVERY_S)

    async def _drain(self, serving: asyncio.Task[None], failure: Error | None) -> None:
        """Accepts no more and finishes what runs, within ``server.shutdown_timeout_s``."""
        self._stop.set()
        self._snapshots.cancel()
        self._state.failure = str(failure) if failure else None
        self._state.enter("stopping")
        self._notifier.stopping()
        self._notifier.extend_timeout(self._state.loaded.config.server.shutdown_timeout_s + DRAIN_MARGIN_S)
        self._supervision.note(f"stopping, {self._state.admissions.n_requests} requests to finish")
        log.info("%s", self._state.note)
        while not self._reloads.empty():
            waiter = self._reloads.get_nowait()
            if waiter is not None and not waiter.done():
                waiter.set_exception(Draining("the daemon is stopping"))
        self._front_ends.stop()
        await serving


def _without_restart_options(old: Config, new: Config) -> Config:
    """What a reload may apply: options that need a restart keep their running values."""
    tables = {change.key.partition(".")[0] for change in diff(old, new) if change.reload == "restart"}
    return new.model_copy(update={name: getattr(old, name) for name in tables})


def _settle(waiter: Waiter, result: Reload, failure: Error | None) -> None:
    """Answers a request for a reload, unless its client has gone."""
    if waiter.done():
        return
    if failure is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(failure)


def _reload_result(changes: Changes | None, failure: Error | None) -> Reload:
    result: Reload = {"ok": failure is None, "at": time.time(), "error": str(failure) if failure else None}
    return result if changes is None else {**result, **changes}


def _failure(working: asyncio.Task[None]) -> Error | None:
    """The error that ended the work, if it has a message for users."""
    error = working.exception() if working.done() and not working.cancelled() else None
    return error if isinstance(error, Error) else None


def _raise_failure(outcome: object) -> None:
    if isinstance(outcome, Exception) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
