"""Replaces an engine that fails, and decodes its windows again in the new one.

Windows are kept here until they are done, so that callers see a pause and no error. A failed engine is opened again at
once, then at growing intervals. A fallback engine may serve meanwhile: when the main engine is open again, it takes the
new windows, and the fallback is closed after its last one.

A window that was inside at every crash is a suspect: it is decoded alone, and after another crash it fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue

from whisperd.engine.base import (
    STEP_S,
    Engine,
    EngineHealth,
    EngineInfo,
    HasDetector,
    Hypothesis,
    Outcome,
    Wakeable,
    Window,
    WindowFailure,
)
from whisperd.engine.resilient.reopener import TRIES, WAIT_FIRST_S, Openers, Reopener, close_quietly
from whisperd.errors import EngineError, Error, ModelLoading
from whisperd.metrics import ModelMeter
from whisperd.speech.vad import SpeechNetwork

log = logging.getLogger(__name__)

CRASHES_UNTIL_ALONE = 2  # a window that was inside at so many crashes is decoded alone
CRASHES_MAX = 3  # and fails after so many
PATIENCE_S = 120.0  # how long windows wait for the first tries


@dataclass(slots=True, kw_only=True, eq=False)
class _Serving:
    """An engine and the windows inside it. ``fallback``: why it is not the main engine."""

    engine: Engine
    fallback: str = ""
    windows: dict[int, Window] = field(default_factory=dict)


class ResilientEngine:
    """Keeps the contracts ``Engine``, ``Wakeable`` and ``HasDetector`` of ``whisperd.engine.base``.

    Args:
        engine: the first one.
        fallback: why it is a fallback; empty for the main engine.
        openers: open its replacements.
        name: of the model, for messages.
        meter: counts crashes and restarts.
        wait_first_s: before the second try to open the main engine; each further wait is twice as long.
    """

    def __init__(
        self,
        engine: Engine,
        openers: Openers,
        *,
        name: str,
        fallback: str = "",
        meter: ModelMeter | None = None,
        wait_first_s: float = WAIT_FIRST_S,
    ) -> None:
        self._name = name
        self._meter = meter or ModelMeter()
        self._current: _Serving | None = _Serving(engine=engine, fallback=fallback)
        self._retiring: list[_Serving] = []
        self._waiting: list[Window] = []
        self._crashes: Counter[int] = Counter()
        self._info = engine.info
        self._last_error = ""
        self._restarts = 0
        self._down_since_s = 0.0
        self._failures = 0  # of the main engine, in a row
        self._wake: Callable[[], None] = lambda: None
        self._opened: SimpleQueue[_Serving] = SimpleQueue()
        self._reopener = Reopener(openers, name=name, deliver=self._receive, wait_first_s=wait_first_s)
        self._watch(engine)
        if fallback:
            self._reopener.begin(fallback, n_crashes=0, n_refused=TRIES, fallback=False)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine that serves now, or served last."""
        current = self._current
        return self._info if current is None else current.engine.info

    @property
    def health(self) -> EngineHealth:
        """The process of the engine that serves now, and why it is a fallback or why there is none."""
        current = self._current
        if current is None:
            return EngineHealth(restarts=self._restarts, outage=self._reopener.reason or self._last_error)
        return replace(current.engine.health, restarts=self._restarts, fallback=current.fallback)

    @property
    def detector(self) -> SpeechNetwork | None:
        """The detector of the engine that serves now."""
        current = self._current
        return current.engine.detector if current is not None and isinstance(current.engine, HasDetector) else None

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        if self._current is None:
            return max(0, self._info.slots - len(self._waiting))
        if any(map(self._is_suspect, self._waiting)):
            return 0
        return max(0, self._current.engine.free_slots - len(self._waiting))

    def on_wake(self, wake: Callable[[], None]) -> None:
        """Sets the callback for a crash, and for an engine that was opened."""
        self._wake = wake
        wake()

    def admit(self, windows: Sequence[Window]) -> None:
        """Takes windows, also while no engine serves."""
        self._waiting += windows

    def step(self) -> Sequence[Outcome]:
        """Works or waits at most about ``STEP_S``; raises nothing."""
        self._install_opened()
        outcomes = self._give_up()
        if self._current is not None:
            self._admit_waiting(self._current)
        for serving in [*([self._current] if self._current else []), *self._retiring]:
            outcomes += self._step_one(serving)
        self._close_retired()
        return outcomes

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Drops windows."""
        for window in [window for window in self._waiting if window.id in window_ids]:
            self._waiting.remove(window)
            self._crashes.pop(window.id, None)
        for serving in [*([self._current] if self._current else []), *self._retiring]:
            inside = frozenset(window_ids & serving.windows.keys())
            for key in inside:
                self._forget(serving, key)
            if inside:
                self._attempt(serving, partial(serving.engine.cancel, inside))

    def close(self) -> None:
        """Closes all engines, also one that is being opened."""
        self._reopener.close()
        with suppress(Empty):
            while True:
                close_quietly(self._opened.get_nowait().engine)
        for serving in [*([self._current] if self._current else []), *self._retiring]:
            close_quietly(serving.engine)
        self._current, self._retiring = None, []

    def _receive(self, engine: Engine, fallback: str) -> None:
        """Called by the reopener's thread."""
        self._opened.put(_Serving(engine=engine, fallback=fallback))
        self._wake()

    def _forward_wake(self) -> None:
        """Looks up the callback at each call: ``on_wake`` may set it later."""
        self._wake()

    def _watch(self, engine: Engine) -> None:
        if isinstance(engine, Wakeable):
            engine.on_wake(self._forward_wake)

    def _install_opened(self) -> None:
        """Switches to an engine that was opened meanwhile; waits for one while none serves."""
        with suppress(Empty):
            opened = self._opened.get(timeout=STEP_S) if self._current is None else self._opened.get_nowait()
            if self._current is not None:
                self._retiring.append(self._current)
            else:
                self._restarts += 1
                self._meter.count_engine_restart()
            self._current, self._info = opened, opened.engine.info
            self._watch(opened.engine)
            info = opened.engine.info
            if opened.fallback:
                log.warning("model %s is served by a fallback on the %s: %s", self._name, info.device, opened.fallback)
            else:
                log.warning("model %s is served again, on %s (%s)", self._name, info.device, info.compute_type)

    def _is_suspect(self, window: Window) -> bool:
        return self._crashes[window.id] >= CRASHES_UNTIL_ALONE

    def _admit_waiting(self, current: _Serving) -> None:
        """Admits waiting windows to the engine; suspects first, and each of them alone."""
        if any(map(self._is_suspect, current.windows.values())):
            return
        suspects = [window for window in self._waiting if self._is_suspect(window)]
        n_taken = 0 if suspects and current.windows else 1 if suspects else current.engine.free_slots
        taken = (suspects or self._waiting)[:n_taken]
        if not taken:
            return
        kept = {window.id for window in taken}
        self._waiting = [window for window in self._waiting if window.id not in kept]
        current.windows |= {window.id: window for window in taken}
        self._attempt(current, partial(current.engine.admit, taken))

    def _step_one(self, serving: _Serving) -> list[Outcome]:
        outcomes = self._attempt(serving, serving.engine.step) or ()
        for outcome in outcomes:
            self._forget(serving, outcome.window_id)
        if any(isinstance(outcome, Hypothesis) for outcome in outcomes) and not serving.fallback:
            self._failures = 0
        return list(outcomes)

    def _attempt(self, serving: _Serving, do: Callable[[], Sequence[Outcome] | None]) -> Sequence[Outcome] | None:
        try:
            return do()
        except Error as error:
            self._retire_failed(serving, str(error))
        except Exception as error:
            log.exception("the engine of %s failed", self._name)
            self._retire_failed(serving, f"{type(error).__name__}: {error}")
        return None

    def _retire_failed(self, serving: _Serving, why: str) -> None:
        if serving is not self._current and serving not in self._retiring:
            return  # it has already failed in this step
        log.error("the engine of %s failed: %s; %d windows start again", self._name, why, len(serving.windows))
        self._meter.count_engine_failure()
        self._crashes.update(serving.windows.keys())
        self._waiting[:0] = serving.windows.values()
        close_quietly(serving.engine)
        if serving is not self._current:
            self._retiring.remove(serving)
            return
        self._current, self._last_error, self._down_since_s = None, why, time.monotonic()
        self._failures += not serving.fallback
        if self._opened.empty():
            self._reopener.begin(why, n_crashes=self._failures)

    def _give_up(self) -> list[Outcome]:
        """Failures for windows after their last crash, and for all of them when no engine serves for too long."""
        error: Error
        failures: list[Outcome] = []
        for window in self._waiting:
            if self._crashes[window.id] >= CRASHES_MAX:
                error = EngineError(f"the engine failed {CRASHES_MAX} times over this audio; last: {self._last_error}")
                failures.append(WindowFailure(window_id=window.id, error=error))
        if self._current is None and self._is_out_of_patience():
            how = "cannot be opened again" if self._reopener.gave_up else "is still being opened again"
            error = ModelLoading(
                f"the engine of {self._name} failed and {how}: {self._reopener.reason or self._last_error}",
                retry_after_s=self._reopener.next_try_s,
            )
            failures = [WindowFailure(window_id=window.id, error=error) for window in self._waiting]
        gone = {outcome.window_id for outcome in failures}
        self._waiting = [window for window in self._waiting if window.id not in gone]
        for key in gone:
            self._crashes.pop(key, None)
        return failures

    def _is_out_of_patience(self) -> bool:
        gave_up = self._reopener.gave_up and self._opened.empty()  # in this order: it delivers an engine first
        return gave_up or time.monotonic() - self._down_since_s > PATIENCE_S

    def _forget(self, serving: _Serving, window_id: int) -> None:
        serving.windows.pop(window_id, None)
        self._crashes.pop(window_id, None)

    def _close_retired(self) -> None:
        """Closes retired engines without windows, in a thread: an engine first finishes the running batch."""
        for serving in [serving for serving in self._retiring if not serving.windows]:
            self._retiring.remove(serving)
            threading.Thread(target=close_quietly, args=(serving.engine,), name=f"close-{self._name}").start()
