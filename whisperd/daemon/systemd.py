"""What systemd hears while the daemon works: one line about it, a sign of life, and requests for more time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping

from whisperd.daemon.leases import Leases
from whisperd.daemon.models import ServedModels
from whisperd.daemon.service import State
from whisperd.engine.base import EngineHealth, EngineInfo
from whisperd.notify import Notifier
from whisperd.store.reconcile import Progress
from whisperd.transcription.batcher import Batcher

TELL_EVERY_S = 1.0
LOAD_TIMEOUT_S = 600.0  # what systemd is asked to bear while a model loads: large ones from slow disks take minutes
STALLS = 2  # a download that stands still is tried once more; both must fit, so that the daemon says what was wrong
STALL_MARGIN_S = 30.0
ERROR_CHARS = 140  # systemd's line has 256, and what is served should be on it too


class Supervision:
    """Keeps systemd informed.

    Args:
        notifier: systemd's socket.
        state: what the daemon is doing; its ``note`` is set here.
        leases: the loaded models.
        engine_stall_s: a batch that takes longer than this will not end any more.
    """

    def __init__(self, notifier: Notifier, state: State, leases: Leases, *, engine_stall_s: float) -> None:
        self._notifier = notifier
        self._state = state
        self._leases = leases
        self._engine_stall_s = engine_stall_s
        self._told = ""
        self._lock = threading.Lock()
        self._downloads: dict[str, Progress] = {}
        self._moved = False
        self._told_progress_at_s = 0.0

    def note(self, text: str) -> None:
        """What the daemon does now."""
        self._state.note = text
        self.tell()

    def tell(self) -> None:
        """Sends the line when it has changed."""
        line = status_line(self._state, self._leases.served)
        if line != self._told:
            self._told = line
            self._notifier.status(line)

    def ready(self) -> None:
        """READY=1, the end of a boot and of every reload."""
        self._notifier.ready()
        self.serving()

    def serving(self) -> None:
        """Nothing is going on but requests."""
        self.note(serving_text(self._leases.served))

    def loading(self, names: Mapping[str, object]) -> None:
        """A model is read from disk; how far that is nobody can tell, so the time for it is asked for at once."""
        self.note("loading " + ", ".join(names))
        self._notifier.extend_timeout(LOAD_TIMEOUT_S)

    def fetched(self, progress: Progress) -> None:
        """Called by the threads that download. More time is asked for only when bytes have arrived."""
        with self._lock:
            before = self._downloads.get(progress.name, progress)  # what an earlier run has left has not arrived now
            self._downloads[progress.name] = progress
            self._moved = self._moved or progress.model.done_bytes != before.model.done_bytes
            now_s = time.monotonic()
            if not self._moved or now_s - self._told_progress_at_s < TELL_EVERY_S:
                return
            self._told_progress_at_s, self._moved = now_s, False
            self._state.downloads = "downloading " + ", ".join(map(progress_text, self._downloads.values()))
        self.tell()
        stall_timeout_s = self._state.loaded.config.reconcile.stall_timeout_s
        self._notifier.extend_timeout(STALLS * stall_timeout_s + STALL_MARGIN_S)

    def fetching_ended(self) -> None:
        """No download runs any more."""
        with self._lock:
            self._downloads.clear()
            self._state.downloads = ""

    async def watch(self) -> None:
        """Tells systemd every second how things are, and that the daemon lives, as long as it does."""
        if not self._notifier.enabled:
            return
        while True:
            self.tell()
            if self._notifier.watchdog_s is not None and self._alive():
                self._notifier.watchdog()
            await asyncio.sleep(min(TELL_EVERY_S, self._notifier.watchdog_s or TELL_EVERY_S))

    def _alive(self) -> bool:
        """The event loop runs, since it runs this; the engines move, or have nothing to do."""
        return all(self._moves(model.batcher) for model in self._leases.served.loaded.values())

    def _moves(self, batcher: Batcher) -> bool:
        """An engine in a process of its own is replaced when it hangs; for one in here the whole daemon has to be."""
        is_here = batcher.health.pid is None and not batcher.health.outage
        return batcher.failure is None and (not is_here or batcher.load.stalled_s < self._engine_stall_s)


def status_line(state: State, served: ServedModels) -> str:
    """What ``systemctl status`` shows: what is going on, the models with their devices, the queue."""
    if state.phase in {"starting", "stopping"}:
        return state.doing
    return "; ".join([*_news(state), serving_text(served), queue_text(state, served)])


def serving_text(served: ServedModels) -> str:
    """The loaded models and where they compute."""
    batchers = {name: model.batcher for name, model in served.loaded.items()}
    return "serving " + ", ".join(_model_text(name, one.info, one.health) for name, one in batchers.items())


def _model_text(name: str, info: EngineInfo, health: EngineHealth) -> str:
    if health.outage:
        return f"{name} DOWN ({health.outage[:ERROR_CHARS]})"
    place = f"{info.device}, {info.compute_type}"
    return f"{name} ({place}, fallback: {health.fallback[:ERROR_CHARS]})" if health.fallback else f"{name} ({place})"


def queue_text(state: State, served: ServedModels) -> str:
    """Requests and windows that wait or run."""
    done = f"{state.requests_done} done"
    if not state.backlog.n_requests:
        return f"idle, {done}"
    waiting = sum(model.batcher.load.waiting for model in served.loaded.values())
    return f"{state.backlog.n_requests} running, {waiting} windows wait, {done}"


def progress_text(progress: Progress) -> str:
    """``name: 56 % of 1.6 GB, 34.5 MB/s, 0:20 left``"""
    return f"{progress.name}: {progress.model.text()}"


def _news(state: State) -> Iterator[str]:
    if state.phase == "reloading":
        yield f"reloading: {state.doing}"
    elif state.downloads:
        yield state.downloads
    elif state.last_reload is not None and not state.last_reload["ok"]:
        yield f"last reload failed: {str(state.last_reload['error'])[:ERROR_CHARS]}"
