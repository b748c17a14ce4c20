"""How much work the daemon has taken on, in requests and in seconds of audio, and when it will have less."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from whisperd.errors import QueueFull

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 120.0  # OpenAI's clients do not come back by themselves after more
RETRY_AFTER_UNKNOWN_S = 2.0


class Backlog:
    """Requests that were admitted and are not done. Safe to use from any thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._places: set[Place] = set()
        self._done_s = 0.0  # audio, for the speed
        self._working: set[Place] = set()  # the others still arrive
        self._busy_s = 0.0  # time with work
        self._busy_since_s = 0.0

    @property
    def n_requests(self) -> int:
        """Requests that are being served."""
        return len(self._places)

    @property
    def audio_s(self) -> float:
        """Audio of theirs that is not transcribed yet, as far as their headers say how long it is."""
        with self._lock:
            return self._audio_s()

    def enter(self, limit: int) -> Place:
        """Admits a request; raises QueueFull when there are ``limit`` already."""
        with self._lock:
            if len(self._places) >= limit:
                raise QueueFull(
                    f"{limit} requests are being served, which is the limit (limits.requests); try again later",
                    retry_after_s=self._retry_after_s(self._audio_s() / limit),
                )
            place = Place(self)
            self._places.add(place)
            return place

    def begin(self, place: Place) -> None:
        """There is work to do; see ``Place.begin``."""
        with self._lock:
            if not self._working:
                self._busy_since_s = self._clock()
            self._working.add(place)

    def announce(self, place: Place, total_s: float, limit_s: float) -> None:
        """The length of a request's audio is known; see ``Place.announce``."""
        with self._lock:
            others_s = self._audio_s() - place.left_s
            if others_s > 0 and others_s + total_s > limit_s:
                raise QueueFull(
                    f"{others_s:.0f} s of audio wait already and this is {total_s:.0f} s more, over the limit of "
                    f"{limit_s:.0f} s (limits.queue_audio_s); try again later",
                    retry_after_s=self._retry_after_s(others_s + total_s - limit_s),
                )
            place.total_s = total_s

    def progress(self, place: Place, done_s: float) -> None:
        """A request got on; see ``Place.progress``."""
        with self._lock:
            self._done_s += max(0.0, done_s - place.done_s)
            place.done_s = max(place.done_s, done_s)

    def leave(self, place: Place) -> None:
        """A request is over; see ``Place.leave``."""
        with self._lock:
            self._places.discard(place)
            if place in self._working:
                self._working.remove(place)
                if not self._working:
                    self._busy_s += self._clock() - self._busy_since_s

    def _audio_s(self) -> float:
        return sum(place.left_s for place in self._places)

    def _retry_after_s(self, audio_s: float) -> float:
        """When so much audio will be done, by the speed so far."""
        busy_s = self._busy_s + (self._clock() - self._busy_since_s if self._working else 0.0)
        if self._done_s <= 0 or busy_s <= 0:
            return RETRY_AFTER_UNKNOWN_S
        return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, audio_s * busy_s / self._done_s))


class Place:
    """One admitted request; made by ``Backlog.enter``."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self.total_s = 0.0
        self.done_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def begin(self) -> None:
        """All of the request has arrived; from now on its time says how fast this daemon is."""
        self._backlog.begin(self)

    @property
    def left_s(self) -> float:
        """Audio that is not transcribed yet."""
        return max(0.0, self.total_s - self.done_s)

    def announce(self, total_s: float, limit_s: float) -> None:
        """So long is the audio; raises QueueFull when all together would be over ``limit_s``.

        Who is alone is never refused: it would not help to come back.
        """
        self._backlog.announce(self, total_s, limit_s)

    def progress(self, done_s: float) -> None:
        """The audio is transcribed up to here."""
        self._backlog.progress(self, done_s)

    def leave(self) -> None:
        """The request is over, however it ended. May be called again."""
        self._backlog.leave(self)
