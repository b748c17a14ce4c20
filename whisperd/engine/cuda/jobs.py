"""Windows inside the engine for GPUs with their finished texts, and the slots that hold their audio."""

from __future__ import annotations

from dataclasses import dataclass, field

from whisperd.engine.base import Hypothesis, TokenTime, Window
from whisperd.engine.cuda.rows import RowPlan, RowText


@dataclass(slots=True, kw_only=True)
class Job:
    """One window. ``unstarted`` texts still wait for a row; ``texts`` are complete.

    ``beams``: so many rows are one search and start together; 0: each row is a text of its own.
    """

    window: Window
    slot: Slot
    language: tuple[str, float] = ("en", 1.0)
    plan: RowPlan = field(default_factory=lambda: RowPlan(prefix=()))
    beams: int = 0
    unstarted: int = 0
    rows: set[int] = field(default_factory=set)
    texts: list[RowText] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True if none of its texts waits or runs."""
        return not self.unstarted and not self.rows

    @property
    def group(self) -> tuple[int, ...]:
        """Its rows, if they are one search; else empty."""
        return tuple(sorted(self.rows)) if self.beams else ()

    @property
    def limit(self) -> float | None:
        """The compression ratio from which a text that repeats itself is broken off; of searches none is."""
        return None if self.beams else self.window.request.compression_ratio_threshold

    def plan_rows(self, plan: RowPlan) -> None:
        """Sets the plan of its rows, and how many there are."""
        request = self.window.request
        self.plan = plan
        self.beams = request.beam_size if asks_for_beams(self.window) else 0
        self.unstarted = self.beams or (request.best_of if request.temperature > 0 else 1)

    def best(self) -> RowText:
        """The likeliest of its texts."""
        return max(self.texts, key=_mean_logprob if self.beams else avg_logprob)

    def hypothesis(self, text: RowText, times: tuple[TokenTime, ...] | None) -> Hypothesis:
        """The outcome of the window."""
        return Hypothesis(
            window_id=self.window.id,
            language=self.language[0],
            language_probability=self.language[1],
            tokens=text.tokens,
            avg_logprob=avg_logprob(text),
            no_speech_prob=text.no_speech_prob,
            temperature=self.window.request.temperature,
            alignment=times,
            looped=text.looped,
        )


def asks_for_beams(window: Window) -> bool:
    """True if a window is decoded by beam search."""
    return window.request.temperature == 0 and window.request.beam_size > 1


def avg_logprob(text: RowText) -> float:
    """Of all tokens and the end, as in openai-whisper."""
    return text.sum_logprob / (len(text.tokens) + 1)


def _mean_logprob(text: RowText) -> float:
    """The rank of a text in a search, as in openai-whisper: without the end in the count, with its probability."""
    return text.sum_logprob / max(1, len(text.tokens))


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """Room for one window. ``audio``: its key; ``languages``: their probabilities, once they were detected."""

    number: int
    audio: int | None = None
    languages: list[float] = field(default_factory=list)

    def forget(self) -> None:
        """Clears what is known of its content, before it is overwritten."""
        self.audio, self.languages = None, []


class Slots:
    """The free slots, the longest free first, so that audio that is decoded again is found as long as possible."""

    def __init__(self, count: int) -> None:
        self._free = [Slot(number=number) for number in range(count)]

    def __len__(self) -> int:
        return len(self._free)

    def holding(self, audio: int | None) -> Slot | None:
        """Takes the free slot that still holds this audio."""
        found = next((slot for slot in self._free if audio is not None and slot.audio == audio), None)
        if found is not None:
            self._free.remove(found)
        return found

    def oldest(self) -> Slot:
        """Takes the slot that has been free for the longest time, and clears it."""
        slot = self._free.pop(0)
        slot.forget()
        return slot

    def give_back(self, slot: Slot) -> None:
        """Frees a slot; its audio stays until the slot is taken again."""
        self._free.append(slot)
