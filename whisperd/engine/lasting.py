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

from whisperd.engine.base import STEP_S, Engine, EngineInfo, Hypothesis, Outcome, Restless, Window, WindowFailure
from whisperd.errors import EngineError, Error, ModelLoading
from whisperd.meter import ModelMeter

log = logging.getLogger(__name__)

DEATHS_ALONE = 2  # a window that was there so often is decoded alone
DEATHS_MAX = 3  # and is given up after so many
TRIES = 2  # that fail before clients are told, or the stand-in comes: what holds the memory may need a moment to end
WAIT_FIRST_S = 1.0
WAIT_MAX_S = 120.0  # between two tries
DEATHS_USELESS = 4  # without anything done in between: more than one bad window can cause
PATIENCE_S = 120.0  # how long windows wait while the first tries go on

Open = Callable[[], Engine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Openers:
    """How engines are opened: each call gives a new one that has proven to work, or raises Error."""

    main: Open
    stand_in: Open | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Place:
    """An engine and the windows inside it."""

    engine: Engine
    lost: str = ""  # why this is a stand-in
    windows: dict[int, Window] = field(default_factory=dict)


class LastingEngine:
    """Behind the contract of ``whisperd.engine.base``, and ``Restless``.

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
        self._outage = ""
        self._down_since_s = 0.0
        self._failures = 0  # of the main engine, in a row
        self._nudge: Callable[[], None] = lambda: None
        self._fresh: SimpleQueue[_Place] = SimpleQueue()
        self._surgeon = _Surgeon(openers, name=name, hand_over=self._hand_over, wait_first_s=wait_first_s)
        self._listen_to(engine)
        if lost:
            self._surgeon.begin(lost, n_deaths=0, n_refused=TRIES, stand_in=False)

    @property
    def info(self) -> EngineInfo:
        """Facts about what serves now, or served last."""
        now = self._now
        if now is None:
            return replace(self._info, pid=None, outage=self._surgeon.reason or self._outage)
        return replace(now.engine.info, fallback=now.lost)

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        if self._now is None:
            return max(0, self._info.slots - len(self._waiting))
        if any(map(self._is_suspect, self._waiting)):
            return 0
        return max(0, self._now.engine.free_slots - len(self._waiting))

    def on_news(self, nudge: Callable[[], None]) -> None:
        """``nudge`` is called when an engine died, or is there again."""
        self._nudge = nudge
        nudge()

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
        self._waiting = [window for window in self._waiting if window.id not in window_ids]
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
                _close(self._fresh.get_nowait().engine)
        for place in [*([self._now] if self._now else []), *self._leaving]:
            _close(place.engine)
        self._now, self._leaving = None, []

    def _hand_over(self, engine: Engine, lost: str) -> None:
        """From the surgeon's thread."""
        self._fresh.put(_Place(engine=engine, lost=lost))
        self._nudge()

    def _tell(self) -> None:
        """Also to an engine that was there before anybody listened."""
        self._nudge()

    def _listen_to(self, engine: Engine) -> None:
        if isinstance(engine, Restless):
            engine.on_news(self._tell)

    def _install(self) -> None:
        """Puts an engine that was opened meanwhile to work; waits for one while nothing serves."""
        with suppress(Empty):
            fresh = self._fresh.get(timeout=STEP_S) if self._now is None else self._fresh.get_nowait()
            if self._now is not None:
                self._leaving.append(self._now)
            else:
                self._meter.engine_restarted()
            self._now, self._info, self._outage = fresh, fresh.engine.info, ""
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
        self._meter.engine_died()
        self._deaths.update(place.windows.keys())
        self._waiting[:0] = place.windows.values()
        _close(place.engine)
        if place is not self._now:
            self._leaving.remove(place)
            return
        self._now, self._outage, self._down_since_s = None, why, time.monotonic()
        self._failures += not place.lost
        self._surgeon.begin(why, n_deaths=self._failures)

    def _forsaken(self) -> list[Outcome]:
        """Windows that are not worth another try, and all of them when nothing serves for too long."""
        error: Error
        lost: list[Outcome] = []
        for window in self._waiting:
            if self._deaths[window.id] >= DEATHS_MAX:
                error = EngineError(f"the engine died {DEATHS_MAX} times over this audio; last: {self._outage}")
                lost.append(WindowFailure(window_id=window.id, error=error))
        if self._now is None and self._is_hopeless():
            error = ModelLoading(
                f"the engine of {self._name} died, and cannot be opened again: {self._surgeon.reason or self._outage}",
                retry_after_s=self._surgeon.next_try_s,
            )
            lost = [WindowFailure(window_id=window.id, error=error) for window in self._waiting]
        gone = {outcome.window_id for outcome in lost}
        self._waiting = [window for window in self._waiting if window.id not in gone]
        for key in gone:
            self._deaths.pop(key, None)
        return lost

    def _is_hopeless(self) -> bool:
        return self._surgeon.is_at_a_loss or time.monotonic() - self._down_since_s > PATIENCE_S

    def _forget(self, place: _Place, window_id: int) -> None:
        place.windows.pop(window_id, None)
        self._deaths.pop(window_id, None)

    def _dismiss(self) -> None:
        """Closes stand-ins that have done their last window; beside, as an engine first ends the batch that runs."""
        for place in [place for place in self._leaving if not place.windows]:
            self._leaving.remove(place)
            threading.Thread(target=_close, args=(place.engine,), name=f"close-{self._name}").start()


class _Surgeon:
    """Opens the main engine again, in a thread of its own for as long as that takes; and the stand-in meanwhile.

    ``reason`` is why the last try failed.
    """

    def __init__(
        self, openers: Openers, *, name: str, hand_over: Callable[[Engine, str], None], wait_first_s: float
    ) -> None:
        self._openers = openers
        self._name = name
        self._hand_over = hand_over
        self._wait_first_s = wait_first_s
        self._changed = threading.Condition()
        self._working = False
        self._closed = False
        self._cases = 0
        self._n_deaths = 0
        self._n_refused = 0
        self._stand_in_wanted = False
        self._next_try_at_s = 0.0
        self.reason = ""

    @property
    def is_at_a_loss(self) -> bool:
        """Whether the first tries were in vain, so that nothing will serve soon."""
        return self._n_refused >= TRIES

    @property
    def next_try_s(self) -> float:
        """When it is worth asking again."""
        return max(1.0, self._next_try_at_s - time.monotonic() + 1.0)

    def begin(self, why: str, *, n_deaths: int, n_refused: int = 0, stand_in: bool = True) -> None:
        """The main engine is lost, or its stand-in is.

        Args:
            why: in words.
            n_deaths: of the main engine without anything done in between.
            n_refused: tries to open it that have failed already.
            stand_in: whether one is needed.
        """
        with self._changed:
            self._cases += 1
            self._n_deaths, self._n_refused = n_deaths, n_refused
            self._stand_in_wanted = stand_in
            self.reason = why
            self._changed.notify()
            if not self._working and not self._closed:
                self._working = True
                threading.Thread(target=self._work, name=f"surgeon-{self._name}", daemon=True).start()

    def close(self) -> None:
        """Ends the work; what is just being opened is closed when it is open."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while self._wait():
            stand_in = self._stand_in_due()
            if stand_in is not None:
                self._stand_in_wanted = False
                self._open(stand_in, lost=self.reason or "it died")
            elif self._open(self._openers.main, lost=""):
                return

    def _stand_in_due(self) -> Open | None:
        useless = self._n_refused >= TRIES or self._n_deaths >= DEATHS_USELESS
        return self._openers.stand_in if useless and self._stand_in_wanted else None

    def _wait(self) -> bool:
        """Until the next try is due; False when there is none."""
        with self._changed:
            case, n_failed = self._cases, self._n_refused + max(0, self._n_deaths - 1)
            at_once = not n_failed or self._stand_in_due() is not None
            due_s = 0.0 if at_once else min(WAIT_MAX_S, self._wait_first_s * 2.0 ** (n_failed - 1))
            self._next_try_at_s = time.monotonic() + due_s
            self._changed.wait_for(lambda: self._closed or self._cases != case, due_s)
            return not self._closed

    def _open(self, opener: Open, *, lost: str) -> bool:
        try:
            engine = opener()
        except Error as error:
            self._failed(str(error))
            return False
        except Exception as error:
            log.exception("the engine of %s could not be opened", self._name)
            self._failed(f"{type(error).__name__}: {error}")
            return False
        with self._changed:
            self._working = bool(lost)
            if not self._closed:
                self._hand_over(engine, lost)
                return True
        _close(engine)
        return True

    def _failed(self, why: str) -> None:
        with self._changed:
            self._n_refused += 1
            self.reason = why
        log.warning("the engine of %s cannot be opened: %s", self._name, why)


def _close(engine: Engine) -> None:
    try:
        engine.close()
    except Exception:
        log.exception("an engine that is not needed any more did not close")
