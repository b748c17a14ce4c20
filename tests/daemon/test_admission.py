"""What the daemon takes on is bounded, and who is refused hears when to come back."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from whisperd.daemon.admission import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, Admission, Admissions
from whisperd.errors import QueueFull

REQUESTS_MAX = 4
AUDIO_MAX_S = 100.0


class AdmissionsMachine(RuleBasedStateMachine):
    """Requests come, say how long they are, get on and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.admissions = Admissions(lambda: self.now_s)
        self.inside: list[Admission] = []
        self.retry_after_s = RETRY_AFTER_MIN_S

    @rule()
    def enter(self) -> None:
        try:
            self.inside.append(self.admissions.enter(REQUESTS_MAX))
        except QueueFull as error:
            self.retry_after_s = error.retry_after_s
            assert len(self.inside) == REQUESTS_MAX

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        if self.inside:
            data.draw(st.sampled_from(self.inside)).begin()

    @rule(data=st.data(), total_s=st.floats(0.1, 150))
    def announce(self, data: st.DataObject, total_s: float) -> None:
        if self.inside:
            admission = data.draw(st.sampled_from(self.inside))
            others_s = self.admissions.audio_s - admission.left_s
            try:
                admission.announce(total_s, AUDIO_MAX_S)
            except QueueFull as error:
                self.retry_after_s = error.retry_after_s
                assert others_s > 0
                assert others_s + total_s > AUDIO_MAX_S

    @rule(data=st.data(), done_s=st.floats(0, 200), took_s=st.floats(0, 5))
    def progress(self, data: st.DataObject, done_s: float, took_s: float) -> None:
        self.now_s += took_s
        if self.inside:
            data.draw(st.sampled_from(self.inside)).progress(done_s)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.inside:
            admission = data.draw(st.sampled_from(self.inside))
            self.inside.remove(admission)
            admission.leave()
            admission.leave()

    @invariant()
    def within_its_limits(self) -> None:
        assert RETRY_AFTER_MIN_S <= self.retry_after_s <= RETRY_AFTER_MAX_S
        assert self.admissions.n_requests == len(self.inside) <= REQUESTS_MAX
        assert self.admissions.audio_s == pytest.approx(sum(admission.left_s for admission in self.inside))
        assert self.inside or self.admissions.audio_s == 0


TestAdmissions = AdmissionsMachine.TestCase


def test_the_time_to_come_back_follows_the_speed() -> None:
    """A daemon that does 50 s of audio a second says so of the 150 s that are too much."""
    now_s = 0.0
    admissions = Admissions(lambda: now_s)
    first = admissions.enter(9)
    now_s = 100.0  # how long an upload takes says nothing of the daemon
    first.begin()
    first.announce(1000, 1000)
    now_s = 110.0
    first.progress(500)
    with pytest.raises(QueueFull, match=r"500 s of audio wait already and this is 650 s more") as caught:
        admissions.enter(9).announce(650, 1000)
    assert caught.value.retry_after_s == pytest.approx(3.0)
