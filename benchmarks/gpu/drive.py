"""The engine alone: everything at once, windows that come by chance, and short requests beside a long file."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.gpu.meter import Meter, Spent
from benchmarks.gpu.report import Report
from benchmarks.gpu.setup import ForcedEngine
from benchmarks.gpu.work import MIXES, Work, check, windows
from whisperd.engine.base import DecodeRequest, Hypothesis, Outcome, Window
from whisperd.speech.units import SAMPLE_RATE_HZ
from whisperd.transcription.batcher import Batcher, Ticket

LOADS = (0.3, 0.6, 0.8)
BULK, INTERACTIVE = MIXES["packed"], MIXES["short"]
AHEAD = 2  # bulk windows in the queue, in multiples of the slots, as a long file has them
PATIENCE_S = 600.0


def run_engine(engine: ForcedEngine, work: Sequence[Work], device: str = "cpu") -> Spent:
    """All windows at once; the engine takes them as it has room."""
    with Meter(device) as spent:
        _driven(engine, work, [0.0] * len(work))
    return spent


def latencies(engine: ForcedEngine, work: Sequence[Work], rate: float) -> list[float]:
    """Seconds that each window waited, when so many come each second, by chance."""
    generator = np.random.default_rng(5)
    return _driven(engine, work, np.cumsum(generator.exponential(1 / rate, len(work))).tolist())


def _driven(engine: ForcedEngine, work: Sequence[Work], arrivals_s: Sequence[float]) -> list[float]:
    waiting = windows(work)
    wanted = {window.id: one.n_tokens for window, one in zip(waiting, work, strict=True)}
    due_s = {window.id: at for window, at in zip(waiting, arrivals_s, strict=True)}
    engine.length = lambda window: wanted[window.id]
    found: list[float] = []
    started_s, taken = time.perf_counter(), 0
    while len(found) < len(work):
        now_s = time.perf_counter() - started_s
        count = sum(at <= now_s for at in arrivals_s[taken : taken + engine.free_slots])
        engine.admit(waiting[taken : taken + count])
        taken += count
        for outcome in engine.step():
            found.append(time.perf_counter() - started_s - due_s[outcome.window_id])
            check(n_tokens(outcome), wanted[outcome.window_id])
    return found


def n_tokens(outcome: Outcome) -> int:
    """Of the text; a window that failed has none."""
    return len(outcome.tokens) if isinstance(outcome, Hypothesis) else 0


class _Timed(Ticket):
    """A request of one window; ``took_s`` and ``n_tokens`` are set when it is answered."""

    def __init__(self, batcher: Batcher, request_id: int) -> None:
        super().__init__(batcher, request_id)
        self.sent_s = time.perf_counter()
        self.took_s = 0.0
        self.n_tokens = 0
        self.answered = threading.Event()

    def deliver(self, outcome: Outcome) -> None:
        self.took_s = time.perf_counter() - self.sent_s
        self.n_tokens = n_tokens(outcome)
        self.answered.set()


class _Bulk(threading.Thread):
    """A file without an end: as many windows in the queue as a request may have."""

    def __init__(self, batcher: Batcher, work: Sequence[Work], lengths: dict[int, int]) -> None:
        super().__init__(daemon=True)
        self._batcher = batcher
        self._work = list(zip(windows(work), work, strict=True))
        self._lengths = lengths
        self._over = threading.Event()
        self.n_done = 0

    def run(self) -> None:
        ticket = self._batcher.ticket()
        ticket.bulk = True
        for index in range(AHEAD * self._batcher.info.slots):
            self._submit(ticket, index)
        while not self._over.is_set():
            ticket.collect()
            self.n_done += 1
            self._submit(ticket, AHEAD * self._batcher.info.slots + self.n_done)
        ticket.close()

    def stop(self) -> None:
        self._over.set()
        self.join(PATIENCE_S)

    def _submit(self, ticket: Ticket, index: int) -> None:
        window, one = self._work[index % len(self._work)]
        self._lengths[len(window.samples)] = one.n_tokens
        ticket.submit(window.samples, window.request)


def beside(engine: ForcedEngine, rate: float, count: int, report: Report, model: str) -> None:
    """Short requests at a third of what the engine can do: alone, then beside bulk. Closes the engine."""
    lengths: dict[int, int] = {}
    engine.length = lambda window: lengths[len(window.samples)]  # the batcher gives windows ids of its own
    work = INTERACTIVE(np.random.default_rng(7), count)
    batcher = Batcher(engine, name="benchmark")
    try:
        report.latency(model, "interactive alone, 30 % load", _asked(batcher, work, LOADS[0] * rate, lengths))
        bulk = _Bulk(batcher, BULK(np.random.default_rng(8), 8 * engine.info.slots), lengths)
        bulk.start()
        started_s = time.perf_counter()
        found = _asked(batcher, work, LOADS[0] * rate, lengths)
        wall_s = time.perf_counter() - started_s
        n_bulk = bulk.n_done
        bulk.stop()
        report.latency(
            model,
            "interactive over bulk, 30 % load",
            found,
            bulk_windows_per_s=n_bulk / wall_s,
            alone_windows_per_s=rate,
        )
    finally:
        batcher.close()


def _asked(batcher: Batcher, work: Sequence[Work], rate: float, lengths: dict[int, int]) -> list[float]:
    """Requests of one window each that come by chance, so many each second."""
    generator = np.random.default_rng(6)
    request, tickets = DecodeRequest(language="en"), []
    due_s = time.perf_counter()
    for number, (window, one) in enumerate(zip(windows(work), work, strict=True)):
        due_s += generator.exponential(1 / rate)
        time.sleep(max(0.0, due_s - time.perf_counter()))
        samples = _marked(window, one, lengths)
        ticket = _Timed(batcher, -1 - number)
        tickets.append(ticket)
        ticket.submit(samples, request)
    for ticket, one in zip(tickets, work, strict=True):
        ticket.answered.wait(PATIENCE_S)
        check(ticket.n_tokens, one.n_tokens)
    return [ticket.took_s for ticket in tickets]


def _marked(window: Window, one: Work, lengths: dict[int, int]) -> np.ndarray:
    """Samples whose number tells the length of the text, whoever else has samples of nearly the same number."""
    count = min(len(window.samples), round(one.duration_s * SAMPLE_RATE_HZ))
    while lengths.get(count, one.n_tokens) != one.n_tokens:
        count -= 1
    lengths[count] = one.n_tokens
    return window.samples[:count]
