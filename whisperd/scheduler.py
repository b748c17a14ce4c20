"""Which window runs next. Pure: ids and counts, no tensors, no clock.

Requests take turns, one window each (deficit round robin with equal costs: every window costs the engine the same).
A request's own windows leave in the order in which they came, except that a window decoded for the second time goes
first: its request waits for it already.

    submit -> waiting -> take -> running -> finish
                  └────────── cancel ──────────┘
"""

from __future__ import annotations

from collections import OrderedDict, deque


class Scheduler:
    """Windows waiting and running, by request. Every method costs no more than the windows it touches."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, deque[int]] = OrderedDict()  # request -> windows; first request is next
        self._running: dict[int, int] = {}  # window -> request

    @property
    def waiting(self) -> int:
        """Windows that wait for a slot."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Windows inside the engine."""
        return len(self._running)

    def submit(self, request_id: int, window_id: int, *, again: bool = False) -> None:
        """A window asks for a slot; ``again`` puts it before the others of its request."""
        queue = self._waiting.setdefault(request_id, deque())
        if again:
            queue.appendleft(window_id)
        else:
            queue.append(window_id)

    def take(self, slots: int) -> tuple[int, ...]:
        """At most ``slots`` windows, now running; requests in turn, starting where the last call stopped."""
        taken: list[int] = []
        while self._waiting and len(taken) < slots:
            request_id, queue = self._waiting.popitem(last=False)
            taken.append(queue.popleft())
            self._running[taken[-1]] = request_id
            if queue:
                self._waiting[request_id] = queue
        return tuple(taken)

    def finish(self, window_id: int) -> None:
        """The engine is done with a window; unknown ids (cancelled ones) are ignored."""
        self._running.pop(window_id, None)

    def cancel(self, request_id: int) -> frozenset[int]:
        """Forgets a request; returns its windows that are still running, for the engine to drop."""
        self._waiting.pop(request_id, None)
        running = frozenset(window for window, owner in self._running.items() if owner == request_id)
        for window_id in running:
            del self._running[window_id]
        return running
