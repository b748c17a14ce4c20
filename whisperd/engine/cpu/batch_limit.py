"""What an engine does when the memory is not enough for a batch: half of it, again, down to one window.

The size that was too much is remembered, so that the next batch does not run into the same wall; after a while of
quiet the limit grows again, for whatever else used the memory may be gone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from whisperd.engine.base import Hypothesis, Outcome, Window, WindowFailure
from whisperd.errors import OutOfMemory
from whisperd.metrics import ModelMeter

log = logging.getLogger(__name__)

GOOD_BATCHES = 64  # so many without trouble, and the limit doubles

Decode = Callable[[Sequence[Window]], Sequence[Hypothesis]]


class BatchLimit:
    """How many windows a batch may have now; at most ``most``. Safe to use from any thread."""

    def __init__(self, most: int, meter: ModelMeter | None = None) -> None:
        self._most = most
        self._now = most
        self._good = 0
        self._meter = meter or ModelMeter()
        self._lock = threading.Lock()

    @property
    def now(self) -> int:
        """Windows of a batch that is not known to be too much."""
        return self._now

    def decoded(self, batch: Sequence[Window], decode: Decode) -> Sequence[Outcome]:
        """Decodes the batch, in halves where it must be; a window that does not even fit alone fails alone.

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
            self._went_well()
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

    def _went_well(self) -> None:
        with self._lock:
            self._good += 1
            if self._good >= GOOD_BATCHES and self._now < self._most:
                self._now, self._good = min(self._most, 2 * self._now), 0
