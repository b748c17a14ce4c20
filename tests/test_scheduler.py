"""The scheduler never loses, duplicates or starves a window."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from whisperd.scheduler import Scheduler


class SchedulerMachine(RuleBasedStateMachine):
    """Random submits, takes, finishes and cancels against a plain model: sets of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.next_id = 0
        self.waiting: dict[int, set[int]] = {}
        self.running: dict[int, int] = {}

    @rule(request=st.integers(0, 5), again=st.booleans())
    def submit(self, request: int, again: bool) -> None:
        self.next_id += 1
        self.scheduler.submit(request, self.next_id, again=again)
        self.waiting.setdefault(request, set()).add(self.next_id)

    @rule(slots=st.integers(0, 9))
    def take(self, slots: int) -> None:
        wanted = min(slots, sum(map(len, self.waiting.values())))
        requests = {request for request, windows in self.waiting.items() if windows}
        taken = self.scheduler.take(slots)
        assert len(taken) == len(set(taken)) == wanted
        owners = [self._leave(window) for window in taken]
        if slots >= len(requests):
            assert requests <= set(owners), "with a slot for each, every waiting request gets one"

    def _leave(self, window: int) -> int:
        owner = next(request for request, windows in self.waiting.items() if window in windows)
        self.waiting[owner].remove(window)
        self.running[window] = owner
        return owner

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            window = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[window]
            self.scheduler.finish(window)

    @rule(request=st.integers(0, 5))
    def cancel(self, request: int) -> None:
        mine = {window for window, owner in self.running.items() if owner == request}
        assert self.scheduler.cancel(request) == mine
        self.waiting.pop(request, None)
        self.running = {window: owner for window, owner in self.running.items() if owner != request}

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.waiting == sum(map(len, self.waiting.values()))
        assert self.scheduler.running == len(self.running)


TestScheduler = SchedulerMachine.TestCase


def test_a_short_request_is_not_stuck_behind_a_long_one() -> None:
    """A single window that arrives behind forty others is in the very next batch."""
    scheduler = Scheduler()
    for window in range(40):
        scheduler.submit(1, window)
    assert scheduler.take(8) == tuple(range(8))
    scheduler.submit(2, 100)
    assert 100 in scheduler.take(2)


def test_a_window_decoded_again_goes_before_the_others_of_its_request() -> None:
    """A retry leaves first within its request."""
    scheduler = Scheduler()
    scheduler.submit(1, 1)
    scheduler.submit(1, 2)
    scheduler.submit(1, 3, again=True)
    assert scheduler.take(3) == (3, 1, 2)
