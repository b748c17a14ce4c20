"""Notifications to systemd while the daemon works: a status line, the watchdog, and requests for more time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable

from whisperd.daemon.leases import Leases
from whisperd.daemon.models import ServedModels
from whisperd.daemon.state import State
from whisperd.daemon.status import Status
from whisperd.notify import Notifier
from whisperd.store.reconcile import Progress
from whisperd.transcription.batcher import Batcher

SEND_EVERY_S = 1.0
LOAD_TIMEOUT_S = 600.0  # what systemd is asked to wait while a model loads: large ones from slow disks take minutes
STALLS = 2  # a download that stands still is tried once more; both must fit, so that the daemon can report the error
STALL_MARGIN_S = 30.0


class Supervision:
    """Keeps systemd informed.

    Args:
        notifier: systemd's socket.
        state: what the daemon is doing; its ``note`` and ``downloads`` are set here.
        status: makes the line.
        leases: the loaded models.
        engine_stall_s: a batch that takes longer than this does not end any more.
    """

    def __init__(
        self, notifier: Notifier, state: State, status: Status, leases: Leases, *, engine_stall_s: float
    ) -> None:
        self._notifier = notifier
        self._state = state
        self._status = status
        self._leases = leases
        self._engine_stall_s = engine_stall_s
        self._sent = ""
        self._lock = threading.Lock()
        self._downloads: dict[str, Progress] = {}
        self._moved = False
        self._sent_progress_at_s = 0.0

    def note(self, text: str) -> None:
        """Sets what the daemon does now."""
        self._state.note = text
        self.send()

    def send(self) -> None:
        """Sends the line when it has changed."""
        line = self._status.line()
        if line != self._sent:
            self._sent = line
            self._notifier.status(line)

    def ready(self) -> None:
        """READY=1, the end of a boot and of every reload."""
        self._notifier.ready()
        self.note_serving()

    def note_serving(self) -> None:
        """Nothing but requests is worked on."""
        self.note(self._status.serving())

    def note_loading(self, names: Iterable[str]) -> None:
        """Models are read from disk. There is no progress to show, so the time for it is asked for at once."""
        self.note("loading " + ", ".join(names))
        self._notifier.extend_timeout(LOAD_TIMEOUT_S)

    def note_progress(self, progress: Progress) -> None:
        """A download got on; called by its thread. More time is asked for only when bytes have arrived."""
        with self._lock:
            before = self._downloads.get(progress.name, progress)  # what an earlier run has left has not arrived now
            self._downloads[progress.name] = progress
            self._moved = self._moved or progress.model.done_bytes != before.model.done_bytes
            now_s = time.monotonic()
            if not self._moved or now_s - self._sent_progress_at_s < SEND_EVERY_S:
                return
            self._sent_progress_at_s, self._moved = now_s, False
            self._state.downloads = "downloading " + ", ".join(map(progress_text, self._downloads.values()))
        self.send()
        stall_timeout_s = self._state.loaded.config.reconcile.stall_timeout_s
        self._notifier.extend_timeout(STALLS * stall_timeout_s + STALL_MARGIN_S)

    def clear_progress(self) -> None:
        """No download runs any more."""
        with self._lock:
            self._downloads.clear()
            self._state.downloads = ""

    async def watch(self) -> None:
        """Sends the line every second, and the watchdog's message as long as the engines move."""
        if not self._notifier.enabled:
            return
        while True:
            self.send()
            if self._notifier.watchdog_s is not None and is_alive(self._leases.served, self._engine_stall_s):
                self._notifier.watchdog()
            await asyncio.sleep(min(SEND_EVERY_S, self._notifier.watchdog_s or SEND_EVERY_S))


def is_alive(served: ServedModels, engine_stall_s: float) -> bool:
    """Whether the engines move, or have nothing to do. That the event loop runs is shown by the call itself."""
    return all(_moves(model.batcher, engine_stall_s) for model in served.loaded.values())


def _moves(batcher: Batcher, engine_stall_s: float) -> bool:
    """An engine in a process of its own is replaced when it hangs; one in here needs a restart of the daemon."""
    is_here = batcher.health.pid is None and not batcher.health.outage
    return batcher.failure is None and (not is_here or batcher.load.stalled_s < engine_stall_s)


def progress_text(progress: Progress) -> str:
    """``name: 56 % of 1.6 GB, 34.5 MB/s, 0:20 left``"""
    return f"{progress.name}: {progress.model.text()}"
