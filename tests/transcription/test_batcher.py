"""One engine decodes many requests: every window is answered once, and no request waits for a failed engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.fakes import FakeEngine, Script, written
from tests.support.speech import silence
from whisperd.engine.base import DecodeRequest, Hypothesis, Window, WindowFailure
from whisperd.errors import Cancelled, EngineError
from whisperd.speech.tokenizer import Vocabulary
from whisperd.transcription.batcher import Batcher, Ticket

Opener = Callable[..., tuple[FakeEngine, Batcher]]


@pytest.fixture
def opened(vocabulary: Vocabulary) -> Iterator[Opener]:
    """Opens a fake engine in a batcher, and closes it."""
    batchers: list[Batcher] = []

    def open_one(script: Script | None = None, *, slots: int = 4) -> tuple[FakeEngine, Batcher]:
        engine = FakeEngine(vocabulary, script, slots=slots)
        batchers.append(Batcher(engine, name="test"))
        return engine, batchers[-1]

    yield open_one
    for batcher in batchers:
        batcher.close()


def submit(ticket: Ticket, n_windows: int) -> set[int]:
    return {ticket.submit(silence(1.0), DecodeRequest()) for _ in range(n_windows)}


def test_every_window_once(opened: Opener) -> None:
    """Windows of several requests share batches and are returned to their own request."""
    engine, batcher = opened()
    tickets = [batcher.ticket() for _ in range(3)]
    sent = [submit(ticket, 7) for ticket in tickets]
    for ticket, expected in zip(tickets, sent, strict=True):
        found = [ticket.collect() for _ in expected]
        assert {outcome.window_id for outcome in found if isinstance(outcome, Hypothesis)} == expected
    assert engine.largest_batch > 1
    assert batcher.load.waiting == batcher.load.running == 0


def test_a_short_request_is_not_stuck(opened: Opener, vocabulary: Vocabulary) -> None:
    """A request of one window is answered long before one of fifty that came first."""
    gate = threading.Event()

    def script(window: Window) -> Hypothesis:
        gate.wait(5)
        return written(vocabulary, window, " hello")

    engine, batcher = opened(script, slots=2)
    long, short = batcher.ticket(), batcher.ticket()
    submit(long, 50)
    (only,) = submit(short, 1)
    gate.set()
    short.collect()
    position = [window.id for window in engine.seen].index(only)
    assert position <= 5


def test_a_failing_window_fails_alone(opened: Opener, vocabulary: Vocabulary) -> None:
    """The window's error reaches its request; the next one is served."""
    failures = iter([RuntimeError("boom")])
    _, batcher = opened(lambda window: next(failures, None) or written(vocabulary, window, " hello"))
    ticket = batcher.ticket()
    submit(ticket, 1)
    outcome = ticket.collect()
    assert isinstance(outcome, WindowFailure)
    assert str(outcome.error) == "boom"
    submit(ticket, 1)
    assert isinstance(ticket.collect(), Hypothesis)


def test_a_failed_engine(opened: Opener) -> None:
    """When the engine itself fails, all waiting requests get an error, and so do later ones."""

    queued = threading.Event()

    def script(_: Window) -> Hypothesis:
        assert queued.wait(30)
        raise MemoryError("the device is gone")

    engine, batcher = opened(script, slots=1)
    ticket = batcher.ticket()
    submit(ticket, 3)
    queued.set()
    outcomes = [ticket.collect() for _ in range(3)]
    assert all(isinstance(outcome, WindowFailure) for outcome in outcomes)
    with pytest.raises(EngineError, match="the device is gone"):
        submit(batcher.ticket(), 1)
    batcher.close()
    assert engine.closed


def test_cancel(opened: Opener) -> None:
    """A closed ticket's windows leave the queue; others are decoded."""
    _, batcher = opened()
    gone, stays = batcher.ticket(), batcher.ticket()
    submit(gone, 20)
    gone.close()
    (only,) = submit(stays, 1)
    outcome = stays.collect()
    assert isinstance(outcome, Hypothesis)
    assert outcome.window_id == only
    assert batcher.load.waiting == 0


def test_a_disconnected_client_frees_its_slots(opened: Opener, vocabulary: Vocabulary) -> None:
    """Running windows of a client that disconnects no longer count at once, and the next step takes others in."""
    gate, started = threading.Event(), threading.Event()

    def script(window: Window) -> Hypothesis:
        started.set()
        gate.wait(5)
        return written(vocabulary, window, " hello")

    engine, batcher = opened(script, slots=2)
    gone, stays = batcher.ticket(), batcher.ticket()
    submit(gone, 10)
    assert started.wait(5)
    gone.close()
    assert (batcher.load.waiting, batcher.load.running) == (0, 0)
    before = len(engine.seen)
    expected = submit(stays, 2)
    gate.set()
    assert {stays.collect().window_id for _ in expected} == expected  # type: ignore[union-attr]
    assert [window.id for window in engine.seen[before:]] == sorted(expected), "the very next windows are theirs"


def test_nothing_is_queued_behind_a_cancellation(opened: Opener) -> None:
    """A request that continues for a moment after its client left cannot queue windows again."""
    _, batcher = opened()
    ticket = batcher.ticket()
    ticket.close()
    with pytest.raises(Cancelled):
        submit(ticket, 1)
    assert batcher.load.waiting == batcher.load.running == 0


def test_lanes(opened: Opener, vocabulary: Vocabulary) -> None:
    """Beside a clip, the windows of a long file take half of the slots, and all of them when the clip is done."""
    gate, started = threading.Event(), threading.Event()

    def script(window: Window) -> Hypothesis:
        started.set()
        gate.wait(5)
        return written(vocabulary, window, " hello")

    engine, batcher = opened(script, slots=4)
    first, long, clip = batcher.ticket(), batcher.ticket(), batcher.ticket()
    submit(first, 1)
    assert started.wait(5)
    long.bulk = True
    submit(long, 20)
    (only,) = submit(clip, 1)
    gate.set()
    clip.collect()
    for _ in range(20):
        long.collect()
    order = [(window.id, window.lane) for window in engine.seen]
    assert order[1] == (only, "interactive")
    assert [lane for _, lane in order[2:]] == ["bulk"] * 20
    assert engine.largest_batch == 4


def test_close_answers_all(opened: Opener, vocabulary: Vocabulary) -> None:
    """Closing with windows inside fails them, and no caller blocks for ever."""
    gate = threading.Event()
    started = threading.Event()

    def script(window: Window) -> Hypothesis:
        started.set()
        gate.wait(5)
        return written(vocabulary, window, " hello")

    engine, batcher = opened(script, slots=1)
    ticket = batcher.ticket()
    submit(ticket, 3)
    started.wait(5)
    closer = threading.Thread(target=batcher.close)
    closer.start()
    gate.set()
    closer.join(5)
    outcomes = [ticket.collect() for _ in range(3)]
    assert sum(isinstance(outcome, WindowFailure) for outcome in outcomes) >= 2
    assert engine.closed
