"""An engine that outlives what it runs on: when the engine inside dies, another one takes its place and its windows.

Windows stay known here until they are done, so that nobody outside notices more than a pause. What died is opened again
at once, and then less and less often. Meanwhile a stand-in may serve, where there is one: when the main engine is back,
new windows go to it, and the stand-in ends with its last window.

A window that was inside whenever the engine died is under suspicion: it is tried alone, then it fails alone.
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
from whisperd.engine.resilient.reopener import TRIES, WAIT_FIRST_S, Openers, Reopener, closed
from whisperd.errors import EngineError, Error, ModelLoading
from whisperd.metrics import ModelMeter
from whisperd.speech.vad import SpeechNetwork

log = logging.getLogger(__name__)

DEATHS_ALONE = 2  # a window that was there so often is decoded alone
DEATHS_MAX = 3  # and is given up after so many
PATIENCE_S = 120.0  # how long windows wait while the first tries go on


@dataclass(slots=True, kw_only=True, eq=False)
class _Place:
    """An engine and the windows inside it."""

    engine: Engine
    lost: str = ""  # why this is a stand-in
    windows: dict[int, Window] = field(default_factory=dict)


class ResilientEngine:
    """Behind the contract of ``whisperd.engine.base``, ``Wakeable`` and ``HasDetector``.

    Args:
        engine: the first one.
        lost: why it is a stand-in; empty for the main one.
        openers: for those that come after it.
        name: of the model, for messages.
        meter: told of deaths and restarts.
        wait_first_s: before the second try to open the main engine; each further wait is twice as long.
    """

    def __init__(
        self,
        engine: Engine,
        openers: Openers,
        *,
        name: str,
        lost: str = "",
        meter: ModelMeter | None = None,
        wait_first_s: float = WAIT_FIRST_S,
    ) -> None:
        self._name = name
        self._meter = meter or ModelMeter()
        self._now: _Place | None = _Place(engine=engine, lost=lost)
        self._leaving: list[_Place] = []
        self._waiting: list[Window] = []
        self._deaths: Counter[int] = Counter()
        self._info = engine.info
        self._last_words = ""
        self._restarts = 0
        self._down_since_s = 0.0
        self._failures = 0  # of the main engine, in a row
        self._wake: Callable[[], None] = lambda: None
        self._fresh: SimpleQueue[_Place] = SimpleQueue()
        self._surgeon = Reopener(openers, name=name, hand_over=self._hand_over, wait_first_s=wait_first_s)
        self._listen_to(engine)
        if lost:
            self._surgeon.begin(lost, n_deaths=0, n_refused=TRIES, stand_in=False)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine that serves now, or served last."""
        now = self._now
        return self._info if now is None else now.engine.info

    @property
    def health(self) -> EngineHealth:
        """The process of the engine that serves now, and why it is a fallback or why there is none."""
        now = self._now
        if now is None:
            return EngineHealth(restarts=self._restarts, outage=self._surgeon.reason or self._last_words)
        return replace(now.engine.health, restarts=self._restarts, fallback=now.lost)

    @property
    def detector(self) -> SpeechNetwork | None:
        """That of the engine that serves now."""
        now = self._now
        return now.engine.detector if now is not None and isinstance(now.engine, HasDetector) else None

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        if self._now is None:
            return max(0, self._info.slots - len(self._waiting))
        if any(map(self._is_suspect, self._waiting)):
            return 0
        return max(0, self._now.engine.free_slots - len(self._waiting))

    def on_wake(self, wake: Callable[[], None]) -> None:
        """``wake`` is called when an engine died, or is there again."""
        self._wake = wake
        wake()

    def admit(self, windows: Sequence[Window]) -> None:
        """Takes windows, also while nothing serves."""
        self._waiting += windows

    def step(self) -> Sequence[Outcome]:
        """Works or waits for a moment; never fails."""
        self._install()
        outcomes = self._forsaken()
        if self._now is not None:
            self._place(self._now)
        for place in [*([self._now] if self._now else []), *self._leaving]:
            outcomes += self._stepped(place)
        self._dismiss()
        return outcomes

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Forgets windows."""
        for window in [window for window in self._waiting if window.id in window_ids]:
            self._waiting.remove(window)
            self._deaths.pop(window.id, None)
        for place in [*([self._now] if self._now else []), *self._leaving]:
            inside = frozenset(window_ids & place.windows.keys())
            for key in inside:
                self._forget(place, key)
            if inside:
                self._try(place, partial(place.engine.cancel, inside))

    def close(self) -> None:
        """Ends everything that runs, and what is just being opened."""
        self._surgeon.close()
        with suppress(Empty):
            while True:
                closed(self._fresh.get_nowait().engine)
        for place in [*([self._now] if self._now else []), *self._leaving]:
            closed(place.engine)
        self._now, self._leaving = None, []

    def _hand_over(self, engine: Engine, lost: str) -> None:
        """From the surgeon's thread."""
        self._fresh.put(_Place(engine=engine, lost=lost))
        self._wake()

    def _tell(self) -> None:
        """Also to an engine that was there before anybody listened."""
        self._wake()

    def _listen_to(self, engine: Engine) -> None:
        if isinstance(engine, Wakeable):
            engine.on_wake(self._tell)

    def _install(self) -> None:
        """Puts an engine that was opened meanwhile to work; waits for one while nothing serves."""
        with suppress(Empty):
            fresh = self._fresh.get(timeout=STEP_S) if self._now is None else self._fresh.get_nowait()
            if self._now is not None:
                self._leaving.append(self._now)
            else:
                self._restarts += 1
                self._meter.count_engine_restart()
            self._now, self._info = fresh, fresh.engine.info
            self._listen_to(fresh.engine)
            info = fresh.engine.info
            if fresh.lost:
                log.warning("model %s is served by a stand-in on the %s: %s", self._name, info.device, fresh.lost)
            else:
                log.warning("model %s is served again, on %s (%s)", self._name, info.device, info.compute_type)

    def _is_suspect(self, window: Window) -> bool:
        return self._deaths[window.id] >= DEATHS_ALONE

    def _place(self, now: _Place) -> None:
        """Gives windows that wait to the engine; those under suspicion first, and each of them alone."""
        if any(map(self._is_suspect, now.windows.values())):
            return
        suspects = [window for window in self._waiting if self._is_suspect(window)]
        n_taken = 0 if suspects and now.windows else 1 if suspects else now.engine.free_slots
        taken = (suspects or self._waiting)[:n_taken]
        if not taken:
            return
        kept = {window.id for window in taken}
        self._waiting = [window for window in self._waiting if window.id not in kept]
        now.windows |= {window.id: window for window in taken}
        self._try(now, partial(now.engine.admit, taken))

    def _stepped(self, place: _Place) -> list[Outcome]:
        outcomes = self._try(place, place.engine.step) or ()
        for outcome in outcomes:
            self._forget(place, outcome.window_id)
        if any(isinstance(outcome, Hypothesis) for outcome in outcomes) and not place.lost:
            self._failures = 0
        return list(outcomes)

    def _try(self, place: _Place, do: Callable[[], Sequence[Outcome] | None]) -> Sequence[Outcome] | None:
        try:
            return do()
        except Error as error:
            self._died(place, str(error))
        except Exception as error:
            log.exception("the engine of %s broke", self._name)
            self._died(place, f"{type(error).__name__}: {error}")
        return None

    def _died(self, place: _Place, why: str) -> None:
        if place is not self._now and place not in self._leaving:
            return  # it has died a moment ago
        log.error("the engine of %s died: %s; %d windows begin again", self._name, why, len(place.windows))
        self._meter.count_engine_failure()
        self._deaths.update(place.windows.keys())
        self._waiting[:0] = place.windows.values()
        closed(place.engine)
        if place is not self._now:
            self._leaving.remove(place)
            return
        self._now, self._last_words, self._down_since_s = None, why, time.monotonic()
        self._failures += not place.lost
        if self._fresh.empty():
            self._surgeon.begin(why, n_deaths=self._failures)

    def _forsaken(self) -> list[Outcome]:
        """Windows that are not worth another try, and all of them when nothing serves for too long."""
        error: Error
        lost: list[Outcome] = []
        for window in self._waiting:
            if self._deaths[window.id] >= DEATHS_MAX:
                error = EngineError(f"the engine died {DEATHS_MAX} times over this audio; last: {self._last_words}")
                lost.append(WindowFailure(window_id=window.id, error=error))
        if self._now is None and self._is_hopeless():
            how = "cannot be opened again" if self._surgeon.gave_up else "is still being opened again"
            error = ModelLoading(
                f"the engine of {self._name} died and {how}: {self._surgeon.reason or self._last_words}",
                retry_after_s=self._surgeon.next_try_s,
            )
            lost = [WindowFailure(window_id=window.id, error=error) for window in self._waiting]
        gone = {outcome.window_id for outcome in lost}
        self._waiting = [window for window in self._waiting if window.id not in gone]
        for key in gone:
            self._deaths.pop(key, None)
        return lost

    def _is_hopeless(self) -> bool:
        at_a_loss = self._surgeon.gave_up and self._fresh.empty()  # in this order: it hands over first
        return at_a_loss or time.monotonic() - self._down_since_s > PATIENCE_S

    def _forget(self, place: _Place, window_id: int) -> None:
        place.windows.pop(window_id, None)
        self._deaths.pop(window_id, None)

    def _dismiss(self) -> None:
        """Closes stand-ins that have done their last window; beside, as an engine first ends the batch that runs."""
        for place in [place for place in self._leaving if not place.windows]:
            self._leaving.remove(place)
            threading.Thread(target=closed, args=(place.engine,), name=f"close-{self._name}").start()
