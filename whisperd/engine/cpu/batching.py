"""Which windows a worker decodes together, and how many of them fit into the memory.

``ReadyQueue`` forms batches by priority, and is pure. ``AdaptiveBatchLimit`` halves a batch that runs out of memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from whisperd.engine.base import DecodeRequest, Hypothesis, Outcome, Window, WindowFailure
from whisperd.errors import OutOfMemory
from whisperd.metrics import ModelMeter

PASSED_OVER_BATCHES = 2  # interactive batches before a bulk one


class ReadyQueue:
    """Windows that wait inside an engine, in the order in which workers take them.

    Interactive windows go first and share batches with each other only; a worker may decode them between two windows
    of a bulk batch that it encodes. After ``PASSED_OVER_BATCHES`` interactive batches the next one is bulk.
    """

    def __init__(self) -> None:
        self._waiting: list[Window] = []
        self._passed_over = 0  # interactive batches since one of the others was taken

    def add(self, windows: Sequence[Window]) -> None:
        """Adds windows."""
        self._waiting.extend(windows)

    def drop(self, window_ids: frozenset[int]) -> frozenset[int]:
        """Removes windows; returns the ids of those that were waiting."""
        dropped = frozenset(window.id for window in self._waiting) & window_ids
        self._waiting = [window for window in self._waiting if window.id not in dropped]
        return dropped

    @property
    def open(self) -> list[Window]:
        """The windows from which a worker may take its next batch."""
        interactive = [window for window in self._waiting if window.lane == "interactive"]
        others = [window for window in self._waiting if window.lane != "interactive"]
        if others and self._passed_over >= PASSED_OVER_BATCHES:
            return others
        return interactive or others

    def take(self, n_idle: int, limit: int) -> list[Window]:
        """The first window and those that fit its batch; an equal share when several workers are idle."""
        fitting = _like_the_first(self.open)
        taken = fitting[: min(limit, -(-len(fitting) // n_idle))]
        self.drop(frozenset(window.id for window in taken))
        passed = taken[0].lane == "interactive" and any(window.lane != "interactive" for window in self._waiting)
        self._passed_over = self._passed_over + 1 if passed else 0
        return taken

    def cut_in(self, n_idle: int, limit: int) -> list[Window]:
        """Interactive windows to decode before the bulk batch that is being encoded; none when a worker is idle."""
        interactive = [window for window in self._waiting if window.lane == "interactive"]
        taken = [] if n_idle else _like_the_first(interactive)[:limit]
        self.drop(frozenset(window.id for window in taken))
        return taken

    def join(self, first: Window, limit: int) -> list[Window]:
        """At most ``limit`` windows of the same lane that fit the batch of ``first``.

        None while interactive windows wait: this batch should end soon.
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
    """Equal for windows of one batch: CTranslate2 takes one set of options, and prompts of one length."""
    return (len(request.prompt_tokens), request.temperature, request.beam_size, request.best_of)


log = logging.getLogger(__name__)

GOOD_BATCHES = 64  # without trouble, until the limit doubles

Decode = Callable[[Sequence[Window]], Sequence[Hypothesis]]


class AdaptiveBatchLimit:
    """The number of windows that a batch may have now, at most ``most``. Safe to use from any thread.

    A batch that runs out of memory is halved, down to one window, and the limit with it, so that the next batch does
    not fail the same way. After ``GOOD_BATCHES`` batches without trouble the limit doubles: memory may be free again.
    """

    def __init__(self, most: int, meter: ModelMeter | None = None) -> None:
        self._most = most
        self._now = most
        self._good = 0
        self._meter = meter or ModelMeter()
        self._lock = threading.Lock()

    @property
    def now(self) -> int:
        """The limit now."""
        return self._now

    def decoded(self, batch: Sequence[Window], decode: Decode) -> Sequence[Outcome]:
        """Decodes the batch, in halves if the memory is not enough; a window that does not fit alone fails.

        Raises whatever ``decode`` raises, but not OutOfMemory.
        """
        return self._decoded(batch, decode, 0)

    def _decoded(self, batch: Sequence[Window], decode: Decode, halvings: int) -> Sequence[Outcome]:
        try:
            found = decode(batch)
        except OutOfMemory as error:
            if len(batch) == 1:
                return [WindowFailure(window_id=batch[0].id, error=error)]
            half = self._halve(len(batch))
        else:
            self._count_good()
            return [replace(one, halvings=halvings) if halvings else one for one in found]
        pieces = (batch[:half], batch[half:])
        return [outcome for piece in pieces for outcome in self._decoded(piece, decode, halvings + 1)]

    def _halve(self, n_windows: int) -> int:
        half = n_windows // 2
        with self._lock:
            self._now, self._good = min(self._now, max(1, half)), 0
        log.warning("out of memory with %d windows in a batch; trying %d", n_windows, half)
        self._meter.count_halving("decode")
        return half

    def _count_good(self) -> None:
        with self._lock:
            self._good += 1
            if self._good >= GOOD_BATCHES and self._now < self._most:
                self._now, self._good = min(self._most, 2 * self._now), 0
