"""Opens an engine that died again: at once, then less and less often, with a stand-in meanwhile where there is one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from whisperd.engine.base import Engine
from whisperd.errors import Error

log = logging.getLogger(__name__)

TRIES = 2  # that fail before clients are told, or the stand-in comes: what holds the memory may need a moment to end
WAIT_FIRST_S = 1.0
WAIT_MAX_S = 120.0  # between two tries
DEATHS_USELESS = 4  # without anything done in between: more than one bad window can cause

Open = Callable[[], Engine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Openers:
    """How engines are opened: each call gives a new one that has proven to work, or raises Error."""

    main: Open
    stand_in: Open | None = None


class Reopener:
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
    def gave_up(self) -> bool:
        """Whether the first tries were in vain and no stand-in comes, so that nothing will serve soon."""
        return self._n_refused >= TRIES and self._stand_in_due() is None

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
            self._failed(str(error), stand_in=bool(lost))
            return False
        except Exception as error:
            log.exception("the engine of %s could not be opened", self._name)
            self._failed(f"{type(error).__name__}: {error}", stand_in=bool(lost))
            return False
        with self._changed:
            self._working = bool(lost)
            if not self._closed:
                self._hand_over(engine, lost)
                self._stand_in_wanted = False
                return True
        closed(engine)
        return True

    def _failed(self, why: str, *, stand_in: bool) -> None:
        with self._changed:
            self._n_refused += 1
            self._stand_in_wanted = (
                self._stand_in_wanted and not stand_in
            )  # it is not tried again before it is needed anew
            self.reason = why
        log.warning("the engine of %s cannot be opened: %s", self._name, why)


def closed(engine: Engine) -> None:
    """Closes an engine, in whatever state it is."""
    try:
        engine.close()
    except Exception:
        log.exception("an engine that is not needed any more did not close")
