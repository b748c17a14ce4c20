"""Which windows a free worker of an engine takes together. Pure.

Interactive windows go first and share batches with their like only, and they may cut into a batch of others that is
still being encoded. But nobody waits for ever: whoever was passed over for a few batches has the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

from whisperd.engine.base import DecodeRequest, Window

PASSED_OVER_BATCHES = 2


class Lanes:
    """Windows that wait inside an engine."""

    def __init__(self) -> None:
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

    @property
    def open(self) -> list[Window]:
        """The windows of which a worker may take some now."""
        interactive = [window for window in self._waiting if window.lane == "interactive"]
        others = [window for window in self._waiting if window.lane != "interactive"]
        if others and self._passed_over >= PASSED_OVER_BATCHES:
            return others
        return interactive or others

    def take(self, n_idle: int, limit: int) -> list[Window]:
        """The first window and those that may run beside it; a fair share, so that no idle worker stays so."""
        fitting = _like_the_first(self.open)
        taken = fitting[: min(limit, -(-len(fitting) // n_idle))]
        self.drop(frozenset(window.id for window in taken))
        passed = taken[0].lane == "interactive" and any(window.lane != "interactive" for window in self._waiting)
        self._passed_over = self._passed_over + 1 if passed else 0
        return taken

    def cut_in(self, n_idle: int, limit: int) -> list[Window]:
        """Interactive windows that a worker decodes before the others that it is encoding; none when one is idle."""
        interactive = [window for window in self._waiting if window.lane == "interactive"]
        taken = [] if n_idle else _like_the_first(interactive)[:limit]
        self.drop(frozenset(window.id for window in taken))
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


def _like_the_first(windows: Sequence[Window]) -> list[Window]:
    return [window for window in windows if batch_key(window.request) == batch_key(windows[0].request)]


def _may_join(window: Window, first: Window) -> bool:
    return window.lane == first.lane and batch_key(window.request) == batch_key(first.request)


def batch_key(request: DecodeRequest) -> tuple[object, ...]:
    """What must be equal in a batch: one set of options for all, and all prompts start at one position."""
    return (len(request.prompt_tokens), request.temperature, request.beam_size, request.best_of)
