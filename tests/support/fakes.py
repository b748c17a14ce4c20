"""An engine that returns scripted hypotheses at once. It keeps the contract of ``whisperd.engine.base``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from whisperd.engine.base import STEP_S, EngineHealth, EngineInfo, Hypothesis, Outcome, TokenTime, Window, WindowFailure
from whisperd.errors import OutOfMemory
from whisperd.metrics import ModelMeter
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ

Script = Callable[[Window], Hypothesis | Exception]


class FakeEngine:
    """Returns for each window what ``script`` returns; ``seen`` keeps all windows in the order of admission.

    More than ``room`` windows at once are too much for its memory.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        script: Script | None = None,
        *,
        slots: int = 4,
        room: int | None = None,
        meter: ModelMeter | None = None,
    ) -> None:
        self.seen: list[Window] = []
        self.closed = False
        self.largest_batch = 0
        self._script = script or (lambda window: written(vocabulary, window, " hello"))
        self._running: list[Window] = []
        self._slots = slots
        self._room = slots if room is None else room
        self._at_once = slots
        self._meter = meter or ModelMeter()
        self.health = EngineHealth()
        self.info = EngineInfo(
            engine="fake",
            device="cpu",
            compute_type="float32",
            multilingual=vocabulary.multilingual,
            languages=tuple(vocabulary.languages),
            slots=slots,
        )

    @property
    def free_slots(self) -> int:
        return self._slots - len(self._running)

    def admit(self, windows: Sequence[Window]) -> None:
        assert len(windows) <= self.free_slots
        self.seen.extend(windows)
        self._running.extend(windows)
        self.largest_batch = max(self.largest_batch, len(self._running))

    def step(self) -> Sequence[Outcome]:
        if not self._running:
            time.sleep(STEP_S / 10)
        done, self._running = self._running[: self._at_once], self._running[self._at_once :]
        failures: list[Outcome] = []
        answers: dict[int, Hypothesis] = {}
        for window in done:
            answer = self._script(window)
            if isinstance(answer, Hypothesis):
                answers[window.id] = answer
            else:
                failures.append(WindowFailure(window_id=window.id, error=answer))
        fine = [window for window in done if window.id in answers]
        return [*failures, *self._within_memory(fine, answers, 0)]

    def cancel(self, window_ids: frozenset[int]) -> None:
        self._running = [window for window in self._running if window.id not in window_ids]

    def close(self) -> None:
        self.closed = True

    def _within_memory(
        self, batch: Sequence[Window], answers: Mapping[int, Hypothesis], halvings: int
    ) -> list[Outcome]:
        """The answers of a batch that fits; a larger batch is halved, and later batches are no larger then."""
        if len(batch) <= self._room:
            return [replace(answers[window.id], halvings=halvings) for window in batch]
        if len(batch) == 1:
            return [WindowFailure(window_id=batch[0].id, error=OutOfMemory("not even one window fits"))]
        half = len(batch) // 2
        self._at_once = min(self._at_once, half)
        self._meter.count_halving("decode")
        pieces = (batch[:half], batch[half:])
        return [outcome for piece in pieces for outcome in self._within_memory(piece, answers, halvings + 1)]


def written(
    vocabulary: Vocabulary,
    window: Window,
    text: str,
    *,
    avg_logprob: float = -0.2,
    no_speech_prob: float = 0.0,
    end_s: float | None = None,
) -> Hypothesis:
    """A hypothesis of one segment from the start of the window to ``end_s`` (its end)."""
    window_s = len(window.samples) / SAMPLE_RATE_HZ
    tokens = vocabulary.encode(text)
    step_s = (end_s or window_s) / max(1, len(tokens))
    times = [
        TokenTime(token=token, start_s=index * step_s, end_s=(index + 1) * step_s, probability=0.9)
        for index, token in enumerate(tokens)
    ]
    end = vocabulary.timestamp_begin + round((end_s or window_s) / 0.02)
    return Hypothesis(
        window_id=window.id,
        language=window.request.language or "en",
        language_probability=0.8,
        tokens=(vocabulary.timestamp_begin, *tokens, end),
        avg_logprob=avg_logprob,
        no_speech_prob=no_speech_prob,
        temperature=window.request.temperature,
        alignment=tuple(times) if window.request.word_timestamps else None,
    )
