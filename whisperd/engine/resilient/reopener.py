"""Opens a failed engine again: at once, then at growing intervals, with a fallback engine meanwhile if there is one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from whisperd.engine.base import Engine
from whisperd.errors import Error

log = logging.getLogger(__name__)

TRIES = 2  # that fail before requests fail or the fallback serves: the old process may hold its memory for a moment
WAIT_FIRST_S = 1.0
WAIT_MAX_S = 120.0  # between two tries
CRASHES_USELESS = 4  # without a finished window in between: more than one bad window can cause

Open = Callable[[], Engine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Openers:
    """Open engines: each call returns a new one that has decoded a window, or raises Error."""

    main: Open
    fallback: Open | None = None


class Reopener:
    """Opens the main engine again in a thread, and the fallback meanwhile.

    ``reason`` is why the last try failed.
    """

    def __init__(
        self, openers: Openers, *, name: str, deliver: Callable[[Engine, str], None], wait_first_s: float
    ) -> None:
        self._openers = openers
        self._name = name
        self._deliver = deliver
        self._wait_first_s = wait_first_s
        self._changed = threading.Condition()
        self._working = False
        self._closed = False
        self._n_requests = 0
        self._n_crashes = 0
        self._n_refused = 0
        self._fallback_wanted = False
        self._next_try_at_s = 0.0
        self.reason = ""

    @property
    def gave_up(self) -> bool:
        """True after ``TRIES`` failed tries without a fallback engine."""
        return self._n_refused >= TRIES and self._fallback_due() is None

    @property
    def next_try_s(self) -> float:
        """Seconds until a client should try again."""
        return max(1.0, self._next_try_at_s - time.monotonic() + 1.0)

    def begin(self, why: str, *, n_crashes: int, n_refused: int = 0, fallback: bool = True) -> None:
        """Starts to reopen after the main engine or its fallback failed.

        Args:
            why: the failure, in words.
            n_crashes: of the main engine without a finished window in between.
            n_refused: tries to open it that have already failed.
            fallback: whether one is needed meanwhile.
        """
        with self._changed:
            self._n_requests += 1
            self._n_crashes, self._n_refused = n_crashes, n_refused
            self._fallback_wanted = fallback
            self.reason = why
            self._changed.notify()
            if not self._working and not self._closed:
                self._working = True
                threading.Thread(target=self._work, name=f"reopen-{self._name}", daemon=True).start()

    def close(self) -> None:
        """Stops the thread; an engine that is being opened is closed as soon as it is open."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while self._wait():
            fallback = self._fallback_due()
            if fallback is not None:
                self._open(fallback, reason=self.reason or "it failed")
            elif self._open(self._openers.main, reason=""):
                return

    def _fallback_due(self) -> Open | None:
        useless = self._n_refused >= TRIES or self._n_crashes >= CRASHES_USELESS
        return self._openers.fallback if useless and self._fallback_wanted else None

    def _wait(self) -> bool:
        """Waits until the next try is due; False after ``close``."""
        with self._changed:
            request, n_failed = self._n_requests, self._n_refused + max(0, self._n_crashes - 1)
            at_once = not n_failed or self._fallback_due() is not None
            due_s = 0.0 if at_once else min(WAIT_MAX_S, self._wait_first_s * 2.0 ** (n_failed - 1))
            self._next_try_at_s = time.monotonic() + due_s
            self._changed.wait_for(lambda: self._closed or self._n_requests != request, due_s)
            return not self._closed

    def _open(self, opener: Open, *, reason: str) -> bool:
        try:
            engine = opener()
        except Error as error:
            self._record_failure(str(error), fallback=bool(reason))
            return False
        except Exception as error:
            log.exception("the engine of %s could not be opened", self._name)
            self._record_failure(f"{type(error).__name__}: {error}", fallback=bool(reason))
            return False
        with self._changed:
            self._working = bool(reason)
            if not self._closed:
                self._deliver(engine, reason)
                self._fallback_wanted = False
                return True
        close_quietly(engine)
        return True

    def _record_failure(self, why: str, *, fallback: bool) -> None:
        with self._changed:
            self._n_refused += 1
            self._fallback_wanted = (
                self._fallback_wanted and not fallback
            )  # it is tried again after the next failure only
            self.reason = why
        log.warning("the engine of %s cannot be opened: %s", self._name, why)


def close_quietly(engine: Engine) -> None:
    """Closes an engine in any state; logs what it raises."""
    try:
        engine.close()
    except Exception:
        log.exception("an engine could not be closed")
