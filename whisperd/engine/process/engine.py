"""An engine whose model is in another process."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from whisperd.engine.base import STEP_S, Engine, EngineHealth, EngineInfo, Outcome, Window
from whisperd.engine.process.messages import Kind, MessageSocket
from whisperd.engine.process.process import Process
from whisperd.errors import EngineError, Error
from whisperd.metrics import ModelMeter
from whisperd.speech.units import Floats

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 600.0  # large models from slow disks take minutes
CLOSE_TIMEOUT_S = 30.0  # an engine ends the batches that run
READER_TIMEOUT_S = 15.0
METERED = frozenset({"observe_batch", "count_halving"})

Opener = Callable[[ModelMeter], Engine]


class ChildEngine:
    """An engine whose model is in another process.

    When that process ends, or is killed because it sends nothing for ``stall_timeout_s``, ``step`` raises EngineError
    with how it ended.

    Args:
        opener: makes the engine in that process: a function that can be pickled, or a ``functools.partial`` of one.
        stall_timeout_s: the longest silence while windows are inside.
        meter: receives the figures of the engine.

    Raises:
        Error: what the opener raised.
        EngineError: the process ended, or was not ready in time.
    """

    def __init__(self, opener: Opener, *, stall_timeout_s: float, meter: ModelMeter | None = None) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._meter = meter or ModelMeter()
        self._turns: SimpleQueue[tuple[Sequence[Outcome], int] | None] = SimpleQueue()
        self._opened: Future[tuple[EngineInfo, Sequence[str]]] = Future()
        self._failure: Error | None = None
        self._wake: Callable[[], None] = lambda: None
        self._inside: set[int] = set()
        self._sent = self._admissible = 0
        self._received_at_s = time.monotonic()
        self._calls: dict[int, Future[Any]] = {}
        self._call_ids = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        self._process = Process(os.environ)
        self._connection = MessageSocket(self._process.end, send_timeout_s=stall_timeout_s)
        self._reader = threading.Thread(target=self._receive_all, name=f"engine-{self._process.pid}", daemon=True)
        self._reader.start()
        try:
            self._send("open", opener)
            info, calls = self._opened.result(OPEN_TIMEOUT_S)
        except Exception as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise EngineError(f"the engine's process was not ready after {OPEN_TIMEOUT_S:g} s") from error
            raise
        self._info = info
        self.health = EngineHealth(pid=self._process.pid)
        self._admissible = info.slots
        self.detector = ChildDetector(self) if "detect" in calls else None

    @property
    def info(self) -> EngineInfo:
        """Constant facts about the loaded model."""
        return self._info

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        return self._admissible - self._sent

    def on_wake(self, wake: Callable[[], None]) -> None:
        """Sets the callback for the end of the process; another thread calls it."""
        self._wake = wake
        if self._failure is not None:
            wake()

    def admit(self, windows: Sequence[Window]) -> None:
        """Sends windows. Raises EngineError when the process has ended, or reads nothing."""
        if not self._inside:
            self._received_at_s = time.monotonic()
        self._inside.update(window.id for window in windows)
        self._sent += len(windows)
        self._send("admit", list(windows))

    def step(self) -> Sequence[Outcome]:
        """Waits at most ``STEP_S`` for finished windows. Raises EngineError when the process has ended."""
        outcomes: list[Outcome] = []
        with suppress(Empty):
            turn = self._turns.get(timeout=STEP_S)
            while turn is not None:
                found, self._admissible = turn
                outcomes += found
                turn = self._turns.get_nowait()
            self._turns.put(None)
            if not outcomes:
                raise self._end
        self._inside.difference_update(outcome.window_id for outcome in outcomes)
        self._check_stall()
        return outcomes

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Drops windows as soon as the engine can."""
        self._inside -= window_ids
        self._send("cancel", window_ids)

    def close(self) -> None:
        """Ends the process after the running batches; all of its memory is free then."""
        if self._closed:
            return
        self._closed = True
        with suppress(Error):
            self._send("close", None)
            self._process.wait(CLOSE_TIMEOUT_S if self._opened.done() else 0)
        self._process.kill()
        self._reader.join(READER_TIMEOUT_S)
        self._connection.close()
        self._process.close()

    def call(self, name: str, arguments: Sequence[Any]) -> Any:
        """Calls a method of the engine and waits for its answer; from any thread.

        Raises:
            Error: what the method raised.
            EngineError: the process has ended.
        """
        answer: Future[Any] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._end
            call_id = next(self._call_ids)
            self._calls[call_id] = answer
        self._send("call", (call_id, name, tuple(arguments)))
        return answer.result()

    @property
    def _end(self) -> Error:
        """The failure as a new object: a traceback grows each time one is raised."""
        failure = self._failure or EngineError("the engine's process is closed")
        return type(failure)(str(failure))

    def _send(self, kind: Kind, value: Any) -> None:
        try:
            self._connection.send(kind, value)
        except BlockingIOError:
            self._abort("reads nothing")
            raise self._end from None
        except OSError:
            self._reader.join(READER_TIMEOUT_S)  # it sets the failure
            raise self._end from None

    def _check_stall(self) -> None:
        if self._inside and time.monotonic() - self._received_at_s > self._stall_timeout_s:
            self._abort("sends nothing")

    def _abort(self, what: str) -> None:
        with self._lock:
            self._failure = self._failure or EngineError(
                f"the engine's process hangs: it {what} for {self._stall_timeout_s:g} s "
                "(engine.stall_timeout_s); it was killed"
            )
        self._process.abort()

    def _receive_all(self) -> None:
        try:
            while (message := self._connection.receive()) is not None:
                HANDLERS[message.kind](self, message.value)
        finally:
            self._record_end()

    def _record_end(self) -> None:
        how = self._process.how_it_ended()
        with self._lock:
            self._failure = self._failure or EngineError(f"the engine's process {how}")
            calls, self._calls = self._calls, {}
        for answer in calls.values():
            answer.set_exception(self._end)
        if not self._opened.done():
            self._opened.set_exception(self._end)
        self._turns.put(None)
        self._wake()

    def _on_opened(self, value: tuple[EngineInfo, Sequence[str]]) -> None:
        self._opened.set_result(value)

    def _on_turn(self, value: tuple[Sequence[Outcome], int]) -> None:
        self._received_at_s = time.monotonic()
        self._turns.put(value)

    def _on_meter(self, value: tuple[str, Sequence[Any]]) -> None:
        self._received_at_s = time.monotonic()
        name, arguments = value
        if name in METERED:
            getattr(self._meter, name)(*arguments)

    def _on_log(self, value: tuple[str, int, str]) -> None:
        name, level, message = value
        logger = logging.getLogger(name)
        if logger.isEnabledFor(level):
            logger.log(level, "%s", message)

    def _on_answer(self, value: tuple[int, Any, Error | None]) -> None:
        call_id, found, error = value
        with self._lock:
            answer = self._calls.pop(call_id)
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(found)

    def _on_failed(self, error: Error) -> None:
        with self._lock:
            self._failure = self._failure or error


HANDLERS: Mapping[Kind, Callable[[ChildEngine, Any], None]] = {
    "opened": ChildEngine._on_opened,
    "turn": ChildEngine._on_turn,
    "meter": ChildEngine._on_meter,
    "log": ChildEngine._on_log,
    "answer": ChildEngine._on_answer,
    "failed": ChildEngine._on_failed,
}


class ChildDetector:
    """The voice detector of an engine that has one: a ``whisperd.speech.vad.SpeechNetwork``."""

    def __init__(self, engine: ChildEngine) -> None:
        self._engine = engine

    def run(self, frames: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
        """float32 [n, 576] and the state to probabilities [n] and the new state; from any thread."""
        probabilities, hidden, cell = self._engine.call("detect", (frames, hidden, cell))
        return probabilities, hidden, cell
