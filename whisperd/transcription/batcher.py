"""One thread that owns one engine: windows of all requests share its batches.

A request has a ticket; its finished windows come back in the ticket's inbox, in the order in which they finish.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.base import (
    DecodeRequest,
    Engine,
    EngineHealth,
    EngineInfo,
    Outcome,
    Wakeable,
    Window,
    WindowFailure,
)
from whisperd.errors import Cancelled, EngineError, Error
from whisperd.metrics import ModelMeter
from whisperd.transcription.scheduler import Scheduler, Turn

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The work of a batcher now: counts of windows, and for how long the engine has not finished any."""

    waiting: int
    running: int
    stalled_s: float


class Ticket:
    """One request's place at a batcher; made by ``Batcher.ticket``.

    ``bulk`` says that the windows submitted from now on belong to a long file.
    """

    def __init__(self, batcher: Batcher, request_id: int) -> None:
        self._batcher = batcher
        self.request_id = request_id
        self.bulk = False
        self.closed = False
        self._inbox: SimpleQueue[Outcome | None] = SimpleQueue()

    def submit(self, samples: NDArray[np.float32], request: DecodeRequest, *, again: int | None = None) -> int:
        """Queues a window (float32 [n], 16 kHz) and returns its id.

        ``again`` marks a further decoding: it is the id of the first window with these samples.
        """
        return self._batcher.enqueue(self, samples, request, again=again)

    def collect(self) -> Outcome | None:
        """The next finished window; None when ``poke`` was called. Blocks."""
        return self._inbox.get()

    def poke(self) -> None:
        """Wakes a thread that is blocked in ``collect``; may be called from any thread."""
        self._inbox.put(None)

    def deliver(self, outcome: Outcome) -> None:
        """Puts a finished window into the inbox; called by the batcher."""
        self._inbox.put(outcome)

    def close(self) -> None:
        """Cancels all windows that wait or run, and refuses further ones. May be called from any thread, and again."""
        self._batcher.cancel(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Queued:
    window: Window
    ticket: Ticket
    since_s: float


class Batcher:
    """Feeds an engine from many requests. All public methods may be called from any thread.

    Args:
        engine: closed with the batcher.
        name: of the model, for threads and messages.
        meter: gets the events of the windows.
    """

    def __init__(self, engine: Engine, *, name: str, meter: ModelMeter | None = None) -> None:
        self._engine = engine
        self._name = name
        self.meter = meter or ModelMeter()
        self._scheduler = Scheduler(bulk_slots=1)
        self._windows: dict[int, _Queued] = {}
        self._ids = itertools.count(1)
        self._wakeup = threading.Condition()
        self._dropped: set[int] = set()
        self._closing = False
        self._woken = False
        self._moved_at_s = time.monotonic()
        self.failure: Error | None = None
        self._thread = threading.Thread(target=self._run, name=f"batcher-{name}", daemon=True)
        self._thread.start()
        if isinstance(engine, Wakeable):
            engine.on_wake(self._wake)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._engine.info

    @property
    def health(self) -> EngineHealth:
        """The state of the engine."""
        return self._engine.health

    @property
    def load(self) -> Load:
        """Windows waiting and running now."""
        with self._wakeup:
            running = self._scheduler.running
            stalled_s = time.monotonic() - self._moved_at_s if running else 0.0
            return Load(waiting=self._scheduler.waiting, running=running, stalled_s=stalled_s)

    def ticket(self) -> Ticket:
        """A place for one request; close it at the end."""
        return Ticket(self, next(self._ids))

    def enqueue(
        self, ticket: Ticket, samples: NDArray[np.float32], request: DecodeRequest, *, again: int | None
    ) -> int:
        """Queues one window for a ticket; see ``Ticket.submit``."""
        with self._wakeup:
            if self.failure is not None:
                raise self.failure
            if ticket.closed:
                raise Cancelled("the request was cancelled")
            window_id = next(self._ids)
            audio = window_id if again is None else again
            window = Window(id=window_id, samples=samples, request=request, audio=audio)
            self._windows[window.id] = _Queued(window=window, ticket=ticket, since_s=time.monotonic())
            self._scheduler.submit(ticket.request_id, window.id, bulk=ticket.bulk, again=again is not None)
            self._wakeup.notify()
        return window.id

    def close(self) -> None:
        """Stops the thread and closes the engine; windows that wait or run fail with EngineError."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    def cancel(self, ticket: Ticket) -> None:
        """Drops all windows of a ticket; see ``Ticket.close``."""
        with self._wakeup:
            ticket.closed = True
            self._dropped |= self._scheduler.cancel(ticket.request_id)
            self._windows = {key: queued for key, queued in self._windows.items() if queued.ticket is not ticket}
            self._wakeup.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._admit()
                self._deliver(self._engine.step())
            self._fail(EngineError("the engine was closed"))
        except Exception as error:
            # the outermost loop of a thread: whatever it was, no request may wait forever for a failed engine
            log.exception("the engine of %s stopped", self._name)
            self.meter.count_engine_failure()
            self._fail(error if isinstance(error, Error) else EngineError(f"the engine stopped: {error!r}"))
        finally:
            self._engine.close()

    def _wake(self) -> None:
        with self._wakeup:
            self._woken = True
            self._wakeup.notify()

    def _wait_for_work(self) -> bool:
        with self._wakeup:
            self._wakeup.wait_for(lambda: self._closing or self._woken or self._scheduler.busy)
            self._woken = False
            return not self._closing

    def _admit(self) -> None:
        with self._wakeup:
            dropped, self._dropped = frozenset(self._dropped), set()
            self._share_slots()
            taken = [self._start(turn) for turn in self._scheduler.take(self._engine.free_slots)]
            if taken and self._scheduler.running == len(taken):
                self._moved_at_s = time.monotonic()
        if dropped:
            self._engine.cancel(dropped)
        if taken:
            self._engine.admit(taken)

    def _share_slots(self) -> None:
        """Called before each step: another engine may have replaced the first one, with other slots."""
        info = self._engine.info
        self._scheduler.most_bulk = info.slots - info.spare_slots
        self._scheduler.bulk_slots = self._scheduler.most_bulk if info.spare_slots else info.slots // 2

    def _start(self, turn: Turn) -> Window:
        queued = self._windows[turn.window_id]
        self.meter.observe_wait(time.monotonic() - queued.since_s)
        return replace(queued.window, lane=turn.lane)

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        with self._wakeup:
            if outcomes:
                self._moved_at_s = time.monotonic()
            for outcome in outcomes:
                self._scheduler.finish(outcome.window_id)
                queued = self._windows.pop(outcome.window_id, None)
                if queued is not None:
                    queued.ticket.deliver(outcome)

    def _fail(self, error: Error) -> None:
        with self._wakeup:
            self.failure = error
            for key, queued in self._windows.items():
                queued.ticket.deliver(WindowFailure(window_id=key, error=error))
            self._windows.clear()
