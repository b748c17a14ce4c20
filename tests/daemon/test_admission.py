"""What the daemon takes on is bounded, and who is refused hears when to come back."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from whisperd.daemon.admission import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, Backlog, Place
from whisperd.errors import QueueFull

REQUESTS_MAX = 4
AUDIO_MAX_S = 100.0


class BacklogMachine(RuleBasedStateMachine):
    """Requests come, say how long they are, get on and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.backlog = Backlog(lambda: self.now_s)
        self.places: list[Place] = []
        self.retry_after_s = RETRY_AFTER_MIN_S

    @rule()
    def enter(self) -> None:
        try:
            self.places.append(self.backlog.enter(REQUESTS_MAX))
        except QueueFull as error:
            self.retry_after_s = error.retry_after_s
            assert len(self.places) == REQUESTS_MAX

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        if self.places:
            data.draw(st.sampled_from(self.places)).begin()

    @rule(data=st.data(), total_s=st.floats(0.1, 150))
    def announce(self, data: st.DataObject, total_s: float) -> None:
        if self.places:
            place = data.draw(st.sampled_from(self.places))
            others_s = self.backlog.audio_s - place.left_s
            try:
                place.announce(total_s, AUDIO_MAX_S)
            except QueueFull as error:
                self.retry_after_s = error.retry_after_s
                assert others_s > 0
                assert others_s + total_s > AUDIO_MAX_S

    @rule(data=st.data(), done_s=st.floats(0, 200), took_s=st.floats(0, 5))
    def progress(self, data: st.DataObject, done_s: float, took_s: float) -> None:
        self.now_s += took_s
        if self.places:
            data.draw(st.sampled_from(self.places)).progress(done_s)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.places:
            place = data.draw(st.sampled_from(self.places))
            self.places.remove(place)
            place.leave()
            place.leave()

    @invariant()
    def within_its_limits(self) -> None:
        assert RETRY_AFTER_MIN_S <= self.retry_after_s <= RETRY_AFTER_MAX_S
        assert self.backlog.n_requests == len(self.places) <= REQUESTS_MAX
        assert self.backlog.audio_s == pytest.approx(sum(place.left_s for place in self.places))
        assert self.places or self.backlog.audio_s == 0


TestBacklog = BacklogMachine.TestCase


def test_the_time_to_come_back_follows_the_speed() -> None:
    """A daemon that does 50 s of audio a second says so of the 150 s that are too much."""
    now_s = 0.0
    backlog = Backlog(lambda: now_s)
    first = backlog.enter(9)
    now_s = 100.0  # how long an upload takes says nothing of the daemon
    first.begin()
    first.announce(1000, 1000)
    now_s = 110.0
    first.progress(500)
    with pytest.raises(QueueFull, match=r"500 s of audio wait already and this is 650 s more") as caught:
        backlog.enter(9).announce(650, 1000)
    assert caught.value.retry_after_s == pytest.approx(3.0)
