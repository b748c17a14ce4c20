"""Calls of many threads are combined into few, and each caller gets the answer to its own question."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.engine.cuda.coalesce import Coalescer

PATIENCE_S = 20.0


class Slow:
    """Doubles numbers; its first call waits until ``go`` is set. ``calls`` are the questions of each call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self.arrived = threading.Semaphore(0)

    def size(self, question: int) -> int:
        return question

    def answer(self, questions: Sequence[int]) -> list[int]:
        self.calls.append(list(questions))
        if len(self.calls) == 1:
            self.entered.set()
            assert self.go.wait(PATIENCE_S)
        if 13 in questions:
            raise ValueError("no thirteens")
        return [2 * question for question in questions]


class Counted(Coalescer[int, int]):
    """Reports how many callers are waiting."""

    def waiting(self) -> int:
        with self._lock:
            return len(self._waiting)


def asked_meanwhile(questions: Sequence[int], most: int) -> tuple[Slow, list[Future[int]]]:
    """Starts one question, then the others one after the other; all are answered at the end."""
    slow = Slow()
    together = Counted(slow.answer, size=slow.size, most=most)
    with ThreadPoolExecutor(len(questions) + 1) as pool:
        answers = [pool.submit(together, 1)]
        assert slow.entered.wait(PATIENCE_S)
        for count, question in enumerate(questions, 1):
            answers.append(pool.submit(together, question))
            while together.waiting() < count:
                threading.Event().wait(0.0001)
        slow.go.set()
    return slow, answers


def test_waiting_questions_are_answered_together() -> None:
    """Questions that came while the first was running are one call, in the order in which they came."""
    slow, answers = asked_meanwhile([2, 3, 4], most=100)
    assert slow.calls == [[1], [2, 3, 4]]
    assert [answer.result(PATIENCE_S) for answer in answers] == [2, 4, 6, 8]


@given(questions=st.lists(st.integers(1, 12), min_size=1, max_size=8), most=st.integers(1, 20))
def test_no_call_is_too_large(questions: list[int], most: int) -> None:
    """Every question is answered; only a single question may exceed the limit, and each call is as full as possible."""
    slow, answers = asked_meanwhile(questions, most)
    assert [answer.result(PATIENCE_S) for answer in answers] == [2, *(2 * question for question in questions)]
    later = slow.calls[1:]
    assert [question for call in later for question in call] == questions
    assert all(sum(call) <= most or len(call) == 1 for call in later)
    assert all(sum(call) + after[0] > most for call, after in pairwise(later))


def test_errors_reach_those_who_asked_together() -> None:
    """A call that fails fails for its questions; the next one is answered."""
    slow, answers = asked_meanwhile([7, 13, 9], most=20)
    assert slow.calls == [[1], [7, 13], [9]]
    assert (answers[0].result(PATIENCE_S), answers[3].result(PATIENCE_S)) == (2, 18)
    for answer in answers[1:3]:
        with pytest.raises(ValueError, match="no thirteens"):
            answer.result(PATIENCE_S)


def test_a_question_waits_for_the_running_call() -> None:
    """A question that comes while the second call runs waits, as during the first."""
    entered, go = threading.Semaphore(0), threading.Semaphore(0)
    at_work: list[int] = []

    def answer(questions: Sequence[int]) -> Sequence[int]:
        at_work.extend(questions)
        assert len(at_work) == 1
        entered.release()
        assert go.acquire(timeout=PATIENCE_S)
        at_work.clear()
        return questions

    together = Counted(answer, size=lambda _: 1, most=1)
    with ThreadPoolExecutor(3) as pool:
        answers = []
        for question in range(3):
            answers.append(pool.submit(together, question))
            if question:  # the call before is running, and this caller has arrived
                while not together.waiting() and not answers[-1].done():
                    threading.Event().wait(0.0001)
                go.release()
            assert entered.acquire(timeout=PATIENCE_S)
        go.release()
        assert [one.result(PATIENCE_S) for one in answers] == [0, 1, 2]


def test_many_threads() -> None:
    """With hundreds of threads in any order, each gets its own answer, and one call runs at a time."""
    busy = threading.Lock()

    def answer(questions: Sequence[int]) -> list[int]:
        assert busy.acquire(blocking=False)
        try:
            return [question + 1 for question in questions]
        finally:
            busy.release()

    together: Coalescer[int, int] = Coalescer(answer, size=lambda _: 1, most=5)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(together, range(2000), timeout=PATIENCE_S)) == list(range(1, 2001))
