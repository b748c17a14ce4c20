"""Which windows a free worker of an engine takes together. Pure.

Interactive windows go first and share batches with their like only; beside windows that yield to them one worker stays
free. But nobody waits for ever: whoever was passed over for a few batches has the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

from whisperd.engine.base import DecodeRequest, Window

PASSED_OVER_BATCHES = 2


class Lanes:
    """Windows that wait inside an engine with ``n_workers`` workers."""

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers
        self._waiting: list[Window] = []
        self._passed_over = 0  # interactive batches since one of the others was taken

    def add(self, windows: Sequence[Window]) -> None:
        """Windows come to wait."""
        self._waiting.extend(windows)

    def drop(self, window_ids: frozenset[int]) -> frozenset[int]:
        """Forgets windows; returns those that were waiting."""
        dropped = frozenset(window.id for window in self._waiting) & window_ids
        self._waiting = [window for window in self._waiting if window.id not in dropped]
        return dropped

    def open_for(self, n_idle: int) -> list[Window]:
        """The windows of which a worker may take some now, when ``n_idle`` workers have nothing to do."""
        interactive = [window for window in self._waiting if window.lane == "interactive"]
        others = [window for window in self._waiting if window.lane != "interactive"]
        if others and self._passed_over >= PASSED_OVER_BATCHES:
            return others
        if interactive:
            return interactive
        if n_idle > 1 or self._n_workers == 1:
            return others
        return [window for window in others if window.lane != "yielding"]

    def take(self, n_idle: int, limit: int) -> list[Window]:
        """The first window and those that may run beside it; a fair share, so that no worker stays idle."""
        open_now = self.open_for(n_idle)
        fitting = [window for window in open_now if batch_key(window.request) == batch_key(open_now[0].request)]
        takers = n_idle - (fitting[0].lane == "yielding" and n_idle > 1)
        taken = fitting[: min(limit, -(-len(fitting) // takers))]
        self.drop(frozenset(window.id for window in taken))
        passed = taken[0].lane == "interactive" and any(window.lane != "interactive" for window in self._waiting)
        self._passed_over = self._passed_over + 1 if passed else 0
        return taken

    def join(self, first: Window, limit: int) -> list[Window]:
        """At most ``limit`` windows of the same lane that may still run beside ``first``.

        None where short requests wait for a worker: the sooner this batch ends, the better.
        """
        if first.lane != "interactive" and any(window.lane == "interactive" for window in self._waiting):
            return []
        fitting = [window for window in self._waiting if _may_join(window, first)][: max(0, limit)]
        self.drop(frozenset(window.id for window in fitting))
        return fitting


def _may_join(window: Window, first: Window) -> bool:
    return window.lane == first.lane and batch_key(window.request) == batch_key(first.request)


def batch_key(request: DecodeRequest) -> tuple[object, ...]:
    """What must be equal in a batch: one set of options for all, and all prompts start at one position."""
    return (len(request.prompt_tokens), request.temperature, request.beam_size, request.best_of)
