"""How much work the daemon has admitted, in requests and in seconds of audio, and when it will have less.

A request takes a place with its head. Where its body comes slowly it yields the place, and waits for one at the end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from whisperd.errors import QueueFull

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 120.0  # OpenAI's clients do not come back by themselves after more
RETRY_AFTER_UNKNOWN_S = 2.0
INSIDE_MAX = 8  # requests inside, those that have yielded their place included, in multiples of the places
GOLDEN = 0.381966  # multiples of it, less their whole part, are spread evenly, however many there are


class _Book:
    """What admitted requests share; all of it is used under ``lock``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.inside: set[Admission] = set()
        self.placed: set[Admission] = set()  # the others have yielded their place
        self.waiting: deque[tuple[Admission, asyncio.Future[None]]] = deque()  # for a place
        self.working: set[Admission] = set()  # the others still upload
        self.done_s = 0.0  # audio, for the speed
        self.busy_s = 0.0  # time with work
        self.busy_since_s = 0.0
        self._promised_s = 0.0  # the latest moment for which a refused client was asked to come back
        self._refused_at_s = 0.0

    def fill_places(self) -> None:
        """Gives free places to those that wait for one."""
        while self.waiting and len(self.placed) < self.waiting[0][0].limit:
            admission, placed = self.waiting.popleft()
            self.placed.add(admission)
            placed.get_loop().call_soon_threadsafe(_settle, placed)

    def audio_s(self) -> float:
        """Audio that is not transcribed yet."""
        return sum(admission.left_s for admission in self.inside)

    def retry_after_s(self, audio_s: float) -> float:
        """When a client that is refused now should come back: when so much audio is done, by the speed so far.

        Each further one gets a later moment, by as much as that takes, so that they do not come back together. Beyond
        RETRY_AFTER_MAX_S the moments begin again between those before.
        """
        step_s, now_s = self._seconds(audio_s), self.clock()
        first_s = min(max(step_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S / 2)
        room_s = RETRY_AFTER_MAX_S - first_s
        step_s = min(step_s, room_s * GOLDEN)
        all_are_back = now_s - self._refused_at_s > RETRY_AFTER_MAX_S
        behind_s = 0.0 if all_are_back else max(0.0, self._promised_s - now_s)
        self._refused_at_s, self._promised_s = now_s, now_s + behind_s + step_s
        rounds, into_s = divmod(behind_s, room_s)
        return first_s + (into_s + step_s * (rounds * GOLDEN % 1)) % room_s

    def _seconds(self, audio_s: float) -> float:
        """How long so much audio takes."""
        busy_s = self.busy_s + (self.clock() - self.busy_since_s if self.working else 0.0)
        if self.done_s <= 0 or busy_s <= 0:
            return RETRY_AFTER_UNKNOWN_S
        return audio_s * busy_s / self.done_s


class Admissions:
    """Requests that were admitted and are not done. Safe to use from any thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._book = _Book(clock)

    @property
    def n_requests(self) -> int:
        """Requests that are being served."""
        return len(self._book.inside)

    @property
    def audio_s(self) -> float:
        """Audio of theirs that is not transcribed yet, as far as their headers say how long it is."""
        with self._book.lock:
            return self._book.audio_s()

    def enter(self, limit: int) -> Admission:
        """Admits a request; raises QueueFull when there are ``limit`` already."""
        book = self._book
        with book.lock:
            n_wanted = len(book.placed) + len(book.waiting)
            if n_wanted >= limit or len(book.inside) >= limit * INSIDE_MAX:
                raise QueueFull(
                    f"{limit} requests are being served, which is the limit (limits.requests); try again later",
                    retry_after_s=book.retry_after_s(book.audio_s() / limit),
                )
            admission = Admission(book, limit)
            book.inside.add(admission)
            book.placed.add(admission)
            return admission


class Admission:
    """One admitted request; made by ``Admissions.enter``."""

    def __init__(self, book: _Book, limit: int) -> None:
        self._book = book
        self.limit = limit
        self._total_s = 0.0
        self._done_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @property
    def left_s(self) -> float:
        """Audio that is not transcribed yet."""
        return max(0.0, self._total_s - self._done_s)

    def yield_place(self) -> None:
        """Lets another request have the place, as long as this one is no work yet."""
        book = self._book
        with book.lock:
            if self not in book.working:
                book.placed.discard(self)
                book.fill_places()

    async def take_place(self) -> None:
        """Returns when the request has a place: at once where it has not yielded it, else in the order of waiting."""
        book = self._book
        with book.lock:
            if self in book.placed:
                return
            placed = asyncio.get_running_loop().create_future()
            book.waiting.append((self, placed))
            book.fill_places()
        await placed

    def begin(self) -> None:
        """Counts the request as work: all of it has arrived, and its time says how fast this daemon is."""
        book = self._book
        with book.lock:
            if not book.working:
                book.busy_since_s = book.clock()
            book.working.add(self)

    def announce(self, total_s: float, limit_s: float) -> None:
        """Sets the length of the audio; raises QueueFull when all together would be over ``limit_s``.

        A request that is alone is never refused: it would not help to come back.
        """
        book = self._book
        with book.lock:
            others_s = book.audio_s() - self.left_s
            if others_s > 0 and others_s + total_s > limit_s:
                raise QueueFull(
                    f"{others_s:.0f} s of audio wait already and this is {total_s:.0f} s more, over the limit of "
                    f"{limit_s:.0f} s (limits.queue_audio_s); try again later",
                    retry_after_s=book.retry_after_s(others_s + total_s - limit_s),
                )
            self._total_s = total_s

    def progress(self, done_s: float) -> None:
        """Sets how much of the audio is transcribed; it never goes back."""
        with self._book.lock:
            self._book.done_s += max(0.0, done_s - self._done_s)
            self._done_s = max(self._done_s, done_s)

    def leave(self) -> None:
        """Removes the request, however it ended. May be called again."""
        book = self._book
        with book.lock:
            book.inside.discard(self)
            book.placed.discard(self)
            book.waiting = deque(one for one in book.waiting if one[0] is not self)
            book.fill_places()
            if self in book.working:
                book.working.remove(self)
                if not book.working:
                    book.busy_s += book.clock() - book.busy_since_s


def _settle(placed: asyncio.Future[None]) -> None:
    if not placed.done():
        placed.set_result(None)
