"""The daemon limits the work that it accepts, and a refused client gets the time after which to retry."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from whisperd.daemon.admission import INSIDE_MAX, RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, Admission, Admissions
from whisperd.errors import QueueFull

REQUESTS_MAX = 4
AUDIO_MAX_S = 100.0


class AdmissionsMachine(RuleBasedStateMachine):
    """Requests arrive, state their length, make progress and leave in any order."""

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
    """At 50 s of audio per second, the time to retry follows from the 150 s that are too much."""
    now_s = 0.0
    admissions = Admissions(lambda: now_s)
    first = admissions.enter(9)
    now_s = 100.0  # the duration of an upload is no measure of the daemon's speed
    first.begin()
    first.announce(1000, 1000)
    now_s = 110.0
    first.progress(500)
    with pytest.raises(QueueFull, match=r"500 s of audio wait already and this is 650 s more") as caught:
        admissions.enter(9).announce(650, 1000)
    assert caught.value.retry_after_s == pytest.approx(3.0)


@pytest.mark.parametrize("seconds_each", [0.05, 1.0, 10.0, 500.0])
def test_refused_clients_do_not_come_back_together(seconds_each: float) -> None:
    """128 clients that are refused in one moment are spread over the time in which there will be room."""
    now_s = 0.0
    admissions = Admissions(lambda: now_s)
    first = admissions.enter(1)
    first.begin()
    first.announce(1000, 1000)
    now_s = seconds_each * 10
    first.progress(10 * 100)  # a tenth of a second of work for each second of audio
    first.announce(1000 + 100, 10_000)
    waits = []
    for _ in range(128):
        with pytest.raises(QueueFull) as caught:
            admissions.enter(1)
        waits.append(caught.value.retry_after_s)
    assert waits[0] == pytest.approx(min(max(seconds_each, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S / 2))
    assert all(RETRY_AFTER_MIN_S <= wait <= RETRY_AFTER_MAX_S for wait in waits)
    in_one_second = max(sum(start <= wait < start + 1 for wait in waits) for start in map(int, waits))
    assert in_one_second <= max(8, 1 / seconds_each + 1)
    now_s += 1000
    with pytest.raises(QueueFull) as caught:
        admissions.enter(1)
    assert caught.value.retry_after_s <= RETRY_AFTER_MAX_S / 2


def refused(admissions: Admissions, limit: int) -> bool:
    with pytest.raises(QueueFull):
        admissions.enter(limit)
    return True


def test_a_place_that_is_yielded() -> None:
    """A yielded place goes to the next request; requests that want theirs back wait in order, before all later ones."""

    async def main() -> None:
        admissions = Admissions()
        slow = [admissions.enter(1)]
        slow[0].yield_place()
        slow.append(admissions.enter(1))
        slow[1].yield_place()
        with admissions.enter(1) as busy:
            busy.begin()
            busy.yield_place()  # work keeps its place
            await busy.take_place()
            waiting = [asyncio.create_task(one.take_place()) for one in slow]
            await asyncio.sleep(0)
            assert refused(admissions, 1)
            assert not any(task.done() for task in waiting)
        await waiting[0]
        assert refused(admissions, 1)
        slow[0].leave()
        await waiting[1]
        slow[1].leave()
        admissions.enter(1).leave()
        assert admissions.n_requests == 0

    asyncio.run(main())


def test_a_request_that_leaves_while_it_waits() -> None:
    """When a waiting request leaves, its turn goes to the next one."""

    async def main() -> None:
        admissions = Admissions()
        slow = [admissions.enter(1)]
        slow[0].yield_place()
        slow.append(admissions.enter(1))
        slow[1].yield_place()
        busy = admissions.enter(1)
        waiting = [asyncio.create_task(one.take_place()) for one in slow]
        await asyncio.sleep(0)
        waiting[0].cancel()
        slow[0].leave()
        busy.leave()
        await waiting[1]

    asyncio.run(main())


def test_slow_requests_are_bounded() -> None:
    """The number of requests that yield their places is limited to a multiple of the places."""
    admissions = Admissions()
    for _ in range(2 * INSIDE_MAX):
        admissions.enter(2).yield_place()
    assert refused(admissions, 2)
    assert admissions.n_requests == 2 * INSIDE_MAX
