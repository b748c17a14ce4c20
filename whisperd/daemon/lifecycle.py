"""Boot, reload, drain. Signal handlers only enqueue; one task does the work in order; nothing here blocks the loop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from whisperd.api import create_app
from whisperd.config import Config, Loaded, diff
from whisperd.daemon import settings
from whisperd.daemon.logs import set_level
from whisperd.daemon.models import Loader
from whisperd.daemon.registry import Registry
from whisperd.daemon.service import DaemonService, State
from whisperd.errors import Draining, Error
from whisperd.metrics import Metrics
from whisperd.notify import Notifier
from whisperd.reconcile import Progress, reconcile, snapshots_without_network
from whisperd.server import Server

log = logging.getLogger(__name__)

Waiter = asyncio.Future[Mapping[str, object]]

LOAD_TIMEOUT_S = 600.0  # what systemd is asked to bear while a model loads: large ones from slow disks take minutes
PROGRESS_EVERY_S = 1.0
ENGINE_STALL_S = 300.0  # a batch that takes longer than this will not end any more
TEND_EVERY_S = 10.0
SIGNALS_TO_STOP = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """Owns everything that lives long. ``run`` returns when it was told to stop, and raises what kept it from booting.

    Args:
        loaded: the configuration to boot with.
        read_config: reads it again for a reload; raises ConfigError.
        environ: the environment.
        notifier: how systemd hears of it.
        sockets: where it listens.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        read_config: Callable[[], Loaded],
        environ: Mapping[str, str],
        notifier: Notifier,
        sockets: Sequence[socket.socket],
    ) -> None:
        self._read_config = read_config
        self._environ = environ
        self._notifier = notifier
        self._sockets = sockets
        config = loaded.config
        self._state = State(loaded=loaded)
        self._registry = Registry()
        self._metrics = Metrics()
        self._loader = Loader(
            self._registry, settings.engine_settings(config), settings.conversions_dir(config, environ), self._metrics
        )
        self._service = DaemonService(
            self._state, self._registry, self._metrics, load_one=self._load_one, reload=self._reload_and_wait
        )
        self._app = create_app(self._service, settings.api_settings(config, environ), self._metrics)
        spool = self._app.state.spool
        self._service.spool_usage = lambda: (spool.used_bytes, spool.open_files)
        self._server = Server(settings.server_settings(config))
        self._reloads: asyncio.Queue[Waiter | None] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._cancel_store = threading.Event()
        self._progress_at_s = 0.0

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT; raises Error when the default model cannot be served."""
        self._handle_signals()
        serving = asyncio.create_task(self._server.serve(self._app, self._sockets))
        working = asyncio.create_task(self._work())
        watching = asyncio.create_task(self._watch())
        tending = asyncio.create_task(self._tend())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(serving)
        finally:
            for task in (stopping, watching, tending, working):
                task.cancel()
            outcomes = await asyncio.gather(working, stopping, watching, tending, return_exceptions=True)
            await asyncio.to_thread(self._registry.close)
            self._service.close()
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
        config = self._state.loaded.config
        snapshots = await self._snapshots(config, all_or_nothing=False)
        await self._switch(config, snapshots)
        self._state.phase = "ready"
        self._notifier.ready(self._note(self._serving()))
        log.info("ready: %s", self._state.note)

    async def _switch(self, config: Config, snapshots: Mapping[str, Path]) -> None:
        self._notifier.status(self._note("loading " + ", ".join(snapshots)))
        self._notifier.extend_timeout(LOAD_TIMEOUT_S)
        await asyncio.to_thread(self._loader.switch, config, snapshots)
        self._state.revisions = {name: _commit(path) for name, path in snapshots.items()}

    async def _snapshots(self, config: Config, *, all_or_nothing: bool) -> Mapping[str, Path]:
        """Where the declared models are; asks the network only for what is not there."""
        wanted = settings.wanted(config)
        store = settings.store_settings(config, self._environ)
        self._notifier.status(self._note("checking the cache"))
        if not store.force:
            found = await asyncio.to_thread(snapshots_without_network, wanted, store)
            if len(found) == len(wanted):
                self._state.problems = ()
                return found
        report = await asyncio.to_thread(
            reconcile,
            wanted,
            store,
            on_plan=lambda plan: log.info("%s", "\n".join(plan.lines())),
            on_progress=self._on_progress,
            cancel=self._cancel_store,
        )
        failed = {result.name: result.error for result in report.results if result.error is not None}
        for name, error in failed.items():
            log.error("model %s: %s", name, error)
        default = wanted[0].name
        if failed and (all_or_nothing or default not in report.snapshots):
            raise failed.get(default) or next(iter(failed.values()))
        self._state.problems = tuple(f"{name}: {error}" for name, error in failed.items())
        return report.snapshots

    def _on_progress(self, progress: Progress) -> None:
        """Called by the threads that download; at most once a second something is said."""
        now_s = time.monotonic()
        if now_s - self._progress_at_s < PROGRESS_EVERY_S:
            return
        self._progress_at_s = now_s
        percent = 100 * progress.done_bytes // progress.total_bytes if progress.total_bytes else 0
        text = f"downloading {progress.name}: {percent} % of {progress.total_bytes / 1e6:.0f} MB"
        self._notifier.status(self._note(text))
        self._notifier.extend_timeout(self._state.loaded.config.reconcile.stall_timeout_s + LOAD_TIMEOUT_S)

    async def _reload_and_wait(self) -> Mapping[str, object]:
        if self._stop.is_set():
            raise Draining("the daemon is stopping")
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._reloads.put_nowait(waiter)
        return await waiter

    async def _reload(self, waiters: Sequence[Waiter]) -> None:
        self._notifier.reloading()
        self._state.phase = "reloading"
        outcome: dict[str, object] = {}
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
            self._state.phase = "ready"
            self._notifier.ready(self._note((f"last reload failed: {failure}; " if failure else "") + self._serving()))
        result = {"ok": failure is None, "at": time.time(), "error": str(failure) if failure else None, **outcome}
        self._state.last_reload = result
        self._metrics.reloaded(ok=failure is None)
        for waiter in waiters:
            _settle(waiter, result, failure)

    async def _apply_changes(self) -> dict[str, object]:
        old = self._state.loaded.config
        read = await asyncio.to_thread(self._read_config)
        config = _without_restart_options(old, read.config)
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
        spool = self._app.state.spool
        spool.upload_bytes, spool.budget_bytes = config.limits.upload_bytes, config.limits.spool_bytes

    async def _load_one(self, name: str) -> None:
        await asyncio.to_thread(self._loader.load_one, name)

    async def _watch(self) -> None:
        """Tells systemd that the daemon lives, unless an engine is stuck in a batch."""
        period_s = self._notifier.watchdog_s
        while period_s is not None:
            models = self._registry.served.models.values()
            if all(model.batcher.load.stalled_s < ENGINE_STALL_S for model in models):
                self._notifier.watchdog()
            await asyncio.sleep(period_s)

    async def _tend(self) -> None:
        """Unloads models that nobody needs."""
        while True:
            idle_s = self._state.loaded.config.limits.model_idle_s
            if idle_s:
                await asyncio.to_thread(self._loader.unload_idle, idle_s)
            await asyncio.sleep(min(TEND_EVERY_S, idle_s / 4) if idle_s else TEND_EVERY_S)

    async def _drain(self, serving: asyncio.Task[None]) -> None:
        """Takes no more work and finishes what runs, within ``server.shutdown_timeout_s``."""
        self._stop.set()
        self._cancel_store.set()
        self._state.phase = "stopping"
        self._notifier.stopping()
        self._notifier.extend_timeout(self._state.loaded.config.server.shutdown_timeout_s + PROGRESS_EVERY_S)
        n_requests = self._state.backlog.n_requests
        self._notifier.status(self._note(f"stopping, {n_requests} requests to finish"))
        log.info("%s", self._state.note)
        while not self._reloads.empty():
            waiter = self._reloads.get_nowait()
            if waiter is not None and not waiter.done():
                waiter.set_exception(Draining("the daemon is stopping"))
        self._server.stop()
        await serving

    def _note(self, text: str) -> str:
        self._state.note = text
        return text

    def _serving(self) -> str:
        served = self._registry.served
        infos = [
            f"{name} ({model.batcher.info.device}, {model.batcher.info.compute_type})"
            for name, model in served.models.items()
        ]
        return "serving " + ", ".join(infos)


def _without_restart_options(old: Config, new: Config) -> Config:
    """What a reload may apply: options that need a restart keep their running values."""
    tables = {change.key.partition(".")[0] for change in diff(old, new) if change.reload == "restart"}
    return new.model_copy(update={name: getattr(old, name) for name in tables})


def _commit(snapshot: Path) -> str | None:
    """The commit of a snapshot in a Hugging Face cache."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def _settle(waiter: Waiter, result: Mapping[str, object], failure: Error | None) -> None:
    """Answers a request for a reload, unless its client has gone."""
    if waiter.done():
        return
    if failure is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(failure)


def _raise_failure(outcome: object) -> None:
    if isinstance(outcome, Exception) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
