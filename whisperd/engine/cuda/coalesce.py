"""Coalesces concurrent calls into batches, for devices on which ten items take as long as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(slots=True, kw_only=True, eq=False)
class _Call(Generic[Question, Answer]):
    """One waiting thread; ``woken`` without an answer or an error: it runs the next batch."""

    question: Question
    woken: threading.Event = field(default_factory=threading.Event)
    answers: list[Answer] = field(default_factory=list)
    error: BaseException | None = None


class Coalescer(Generic[Question, Answer]):
    """A function of one question, made of a function of several; any number of threads may call it.

    It has no thread of its own: the first caller runs a batch, and calls that arrive meanwhile wait. Then the first
    waiting caller runs the next batch, for as many of them as fit.

    Args:
        answer: the answers of several questions, in order; never called twice at the same time.
        size: of one question.
        most: the largest sum of sizes in one batch; a larger question is answered alone.
    """

    def __init__(
        self, answer: Callable[[Sequence[Question]], Sequence[Answer]], *, size: Callable[[Question], int], most: int
    ) -> None:
        self._answer = answer
        self._size = size
        self._most = most
        self._lock = threading.Lock()
        self._waiting: list[_Call[Question, Answer]] = []
        self._running = False

    def __call__(self, question: Question) -> Answer:
        """Blocks; raises what ``answer`` raised for any question that was answered together with this one."""
        call: _Call[Question, Answer] = _Call(question=question)
        with self._lock:
            self._waiting.append(call)
            mine, self._running = not self._running, True
        if not mine:
            call.woken.wait()
        if not call.answers and call.error is None:
            self._work()
        if call.error is not None:
            raise call.error
        return call.answers[0]

    def _work(self) -> None:
        with self._lock:
            calls = self._taken()
        try:
            for call, answer in zip(calls, self._answer([call.question for call in calls]), strict=True):
                call.answers.append(answer)
        except BaseException as error:
            for call in calls:
                call.error = error
            raise
        finally:
            self._finish(calls)

    def _finish(self, calls: list[_Call[Question, Answer]]) -> None:
        with self._lock:
            self._running = bool(self._waiting)
            next_calls = self._waiting[:1]
        for call in [*calls, *next_calls]:
            call.woken.set()

    def _taken(self) -> list[_Call[Question, Answer]]:
        room = self._most - self._size(self._waiting[0].question)
        count = 1
        while count < len(self._waiting) and room >= self._size(self._waiting[count].question):
            room -= self._size(self._waiting[count].question)
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken
