"""The scheduler never loses, duplicates or starves a window."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from whisperd.transcription.scheduler import CALM_WINDOWS, INTERACTIVE_RUN, Scheduler, Turn

SLOTS = 8
BULK_SLOTS = 3
REQUESTS = st.integers(0, 5)


class SchedulerMachine(RuleBasedStateMachine):
    """Random submits, takes, finishes and cancels against a plain model: sets of ids.

    A request's windows may be of both kinds: a file of unknown length becomes bulk on the way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(bulk_slots=BULK_SLOTS)
        self.next_id = 0
        self.waiting: dict[tuple[int, bool], set[int]] = {}
        self.running: dict[int, tuple[int, bool]] = {}
        self.passed_over: dict[tuple[int, bool], int] = {}  # windows of others since the request's last turn

    @rule(request=REQUESTS, bulk=st.booleans(), again=st.booleans())
    def submit(self, request: int, bulk: bool, again: bool) -> None:
        self.next_id += 1
        self.scheduler.submit(request, self.next_id, bulk=bulk, again=again)
        self.waiting.setdefault((request, bulk), set()).add(self.next_id)

    @rule(slots=st.integers(0, SLOTS))
    def take(self, slots: int) -> None:
        for turn in self.scheduler.take(slots):
            key = next(key for key, windows in self.waiting.items() if turn.window_id in windows)
            assert key[1] == (turn.lane != "interactive")
            self.passed_over = {other: count + 1 for other, count in self.passed_over.items() if other != key}
            self.waiting[key].remove(turn.window_id)
            self.running[turn.window_id] = key
            slots -= 1
            self._nobody_starves()
        assert slots >= 0, "never more windows than slots"
        if slots:
            assert not self._waiting(bulk=False), "a free slot is never kept from an interactive window"
            if self._waiting(bulk=True):
                assert self._bulk_running() >= BULK_SLOTS, "bulk waits beside a free slot only at its cap"

    @rule()
    def finish_all(self) -> None:
        for window in sorted(self.running):
            self.scheduler.finish(window)
        self.running.clear()

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            window = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[window]
            self.scheduler.finish(window)

    @rule(window=st.integers(1, 1000))
    def finish_what_nobody_knows(self, window: int) -> None:
        """The engine may bring a window back that was cancelled meanwhile."""
        if window not in self.running:
            self.scheduler.finish(window)

    @rule(request=REQUESTS)
    def cancel(self, request: int) -> None:
        mine = {window for window, (owner, _) in self.running.items() if owner == request}
        assert self.scheduler.cancel(request) == mine
        for bulk in (False, True):
            self.waiting.pop((request, bulk), None)
            self.passed_over.pop((request, bulk), None)
        self.running = {window: key for window, key in self.running.items() if key[0] != request}

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.waiting == sum(map(len, self.waiting.values()))
        assert self.scheduler.running == len(self.running)

    def _nobody_starves(self) -> None:
        """Between two turns of a waiting request every other one has few; this counts only while its kind may run."""
        for key in [key for key, windows in self.waiting.items() if windows]:
            count = self.passed_over.setdefault(key, 0)
            if key[1] and self._bulk_running() >= BULK_SLOTS:
                self.passed_over[key] = 0
                continue
            rounds = 6 * (INTERACTIVE_RUN + 1) if key[1] else 6 + 6 // INTERACTIVE_RUN + 1
            assert count <= rounds, f"{key} was passed over {count} times"

    def _waiting(self, *, bulk: bool) -> int:
        return sum(len(windows) for (_, kind), windows in self.waiting.items() if kind == bulk)

    def _bulk_running(self) -> int:
        return sum(bulk for _, bulk in self.running.values())


TestScheduler = SchedulerMachine.TestCase


def ids(turns: tuple[Turn, ...]) -> list[int]:
    return [turn.window_id for turn in turns]


def test_a_short_request_is_not_stuck_behind_a_long_one() -> None:
    """A single window that arrives behind forty others is in the very next batch, even one of the same kind."""
    for bulk in (False, True):
        scheduler = Scheduler(bulk_slots=SLOTS)
        for window in range(40):
            scheduler.submit(1, window, bulk=bulk)
        assert ids(scheduler.take(8)) == list(range(8))
        scheduler.submit(2, 100, bulk=bulk)
        assert 100 in ids(scheduler.take(2))


def test_a_window_decoded_again_goes_before_the_others_of_its_request() -> None:
    """A retry comes first within its request."""
    scheduler = Scheduler(bulk_slots=SLOTS)
    scheduler.submit(1, 1)
    scheduler.submit(1, 2)
    scheduler.submit(1, 3, again=True)
    assert ids(scheduler.take(3)) == [3, 1, 2]


def test_interactive_goes_before_bulk() -> None:
    """A clip's windows come before those of a long file, but in a long row of clips the file keeps its turn."""
    scheduler = Scheduler(bulk_slots=SLOTS)
    for window in range(3):
        scheduler.submit(1, window, bulk=True)
    for window in range(100, 110):
        scheduler.submit(2, window)
    assert ids(scheduler.take(12)) == [100, 101, 102, 103, 0, 104, 105, 106, 107, 1, 108, 109]


def test_bulk_gets_all_slots_when_alone() -> None:
    """A file that is alone has the whole engine; beside clips it has its share, and afterwards all again."""
    scheduler = Scheduler(bulk_slots=2)
    for window in range(60):
        scheduler.submit(1, window, bulk=True)
    assert len(scheduler.take(6)) == 6
    for window in range(6):
        scheduler.finish(window)
    scheduler.submit(2, 100)
    turns = scheduler.take(6)
    assert ids(turns) == [100, 6, 7], "three slots stay free for the next clip"
    assert [turn.lane for turn in turns] == ["interactive", "bulk", "bulk"]
    taken = 2
    while taken < CALM_WINDOWS:
        assert not scheduler.take(6)
        for window in (4 + taken, 5 + taken):
            scheduler.finish(window)
        taken += len(scheduler.take(6))
    assert [turn.lane for turn in scheduler.take(3)] == ["bulk"] * 3


def test_bulk_leaves_spare_slots() -> None:
    """Where an engine keeps slots for short requests, a file that is alone does not take them."""
    scheduler = Scheduler(bulk_slots=4, most_bulk=4)
    for window in range(10):
        scheduler.submit(1, window, bulk=True)
    assert ids(scheduler.take(6)) == [0, 1, 2, 3]
    scheduler.submit(2, 100)
    assert ids(scheduler.take(2)) == [100]


def test_busy() -> None:
    """A scheduler is busy while a window waits or runs, and not before or after."""
    scheduler = Scheduler(bulk_slots=1)
    seen = [scheduler.busy]
    scheduler.submit(1, 1)
    seen.append(scheduler.busy)
    (turn,) = scheduler.take(1)
    seen.append(scheduler.busy)
    scheduler.finish(turn.window_id)
    assert [*seen, scheduler.busy] == [False, True, True, False]
