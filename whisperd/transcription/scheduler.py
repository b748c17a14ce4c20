"""Which window runs next. Pure: ids and counts, no tensors, no clock.

Requests take turns, one window each (deficit round robin with equal costs: every window costs the engine the same).
A request's own windows leave in the order in which they came, except that a window decoded for the second time goes
first: its request waits for it already.

Two rings of requests: interactive ones go before bulk ones, but after ``INTERACTIVE_RUN`` windows in a row one of bulk
gets its turn, so that no request starves. While interactive windows wait or ran lately, bulk ones hold no more than
``bulk_slots``, and never more than ``most_bulk``: the next short request finds a free slot at once, instead of waiting
for a whole batch of an hour-long file.

    submit -> waiting -> take -> running -> finish
                  └────────── cancel ──────────┘
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from whisperd.engine.base import Lane

INTERACTIVE_RUN = 4  # windows in a row while bulk waits
CALM_WINDOWS = 16  # so many bulk windows after the last interactive one, bulk may have all slots again


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A window that runs next."""

    window_id: int
    lane: Lane


class _Ring:
    """Requests in turn, each with its waiting windows; the first one is next."""

    def __init__(self) -> None:
        self._queues: OrderedDict[int, deque[int]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, request_id: int, window_id: int, *, first: bool) -> None:
        queue = self._queues.setdefault(request_id, deque())
        if first:
            queue.appendleft(window_id)
        else:
            queue.append(window_id)

    def pop(self) -> tuple[int, int]:
        """The next request and its window; the request goes to the end."""
        request_id, queue = self._queues.popitem(last=False)
        window_id = queue.popleft()
        if queue:
            self._queues[request_id] = queue
        return request_id, window_id

    def drop(self, request_id: int) -> None:
        self._queues.pop(request_id, None)


class Scheduler:
    """Windows waiting and running, by request. Every method costs no more than the windows it touches.

    Args:
        bulk_slots: the most that bulk windows hold while interactive ones wait or ran lately; at least 1. May change.
        most_bulk: the most that they hold at any time, likewise; None: all slots.
    """

    def __init__(self, *, bulk_slots: int, most_bulk: int | None = None) -> None:
        self.bulk_slots = bulk_slots
        self.most_bulk = most_bulk
        self._interactive = _Ring()
        self._bulk = _Ring()
        self._running: dict[int, tuple[int, bool]] = {}  # window -> (request, whether it is bulk)
        self._bulk_running = 0
        self._run = 0  # interactive windows in a row while bulk waited
        self._bulk_since = CALM_WINDOWS  # bulk windows since the last interactive one

    @property
    def waiting(self) -> int:
        """Windows that wait for a slot."""
        return len(self._interactive) + len(self._bulk)

    @property
    def running(self) -> int:
        """Windows inside the engine."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether any window waits or runs."""
        return bool(self._interactive or self._bulk or self._running)

    @property
    def ready(self) -> bool:
        """Whether ``take`` would find a window if there was a slot."""
        return bool(self._interactive) or self._bulk_may_run()

    def submit(self, request_id: int, window_id: int, *, bulk: bool = False, again: bool = False) -> None:
        """Adds a window that waits for a slot; ``again`` puts it before the others of its request."""
        (self._bulk if bulk else self._interactive).add(request_id, window_id, first=again)

    def take(self, slots: int) -> tuple[Turn, ...]:
        """At most ``slots`` windows, now running; requests in turn, starting where the last call stopped."""
        turns: list[Turn] = []
        while len(turns) < slots and self.ready:
            lane = self._next_lane()
            request_id, window_id = (self._interactive if lane == "interactive" else self._bulk).pop()
            self._start(request_id, window_id, bulk=lane == "bulk")
            turns.append(Turn(window_id=window_id, lane=lane))
        return tuple(turns)

    def finish(self, window_id: int) -> None:
        """Removes a window that the engine has finished; unknown ids (cancelled ones) are ignored."""
        _, bulk = self._running.pop(window_id, (None, False))
        self._bulk_running -= bulk

    def cancel(self, request_id: int) -> frozenset[int]:
        """Removes a request; returns its windows that are still running, for the engine to drop."""
        self._interactive.drop(request_id)
        self._bulk.drop(request_id)
        running = frozenset(window for window, (owner, _) in self._running.items() if owner == request_id)
        for window_id in running:
            self.finish(window_id)
        return running

    @property
    def _contended(self) -> bool:
        return bool(self._interactive) or self._bulk_since < CALM_WINDOWS

    def _bulk_may_run(self) -> bool:
        limit = self.bulk_slots if self._contended else self.most_bulk
        return bool(self._bulk) and (limit is None or self._bulk_running < max(1, limit))

    def _next_lane(self) -> Lane:
        bulks_turn = not self._interactive or (self._run >= INTERACTIVE_RUN and self._bulk_may_run())
        return "bulk" if bulks_turn else "interactive"

    def _start(self, request_id: int, window_id: int, *, bulk: bool) -> None:
        self._running[window_id] = (request_id, bulk)
        self._bulk_running += bulk
        if bulk:
            self._run = 0
            self._bulk_since = min(CALM_WINDOWS, self._bulk_since + 1)
        else:
            self._run = self._run + 1 if self._bulk else 0
            self._bulk_since = 0
