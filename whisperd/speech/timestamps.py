"""From sampled tokens to segment and word times. Pure.

The rules are openai-whisper's (``transcribe.py`` and ``timing.py``): timestamp tokens come in pairs that close one
segment and open the next, and words inherit the times of their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from whisperd.speech.transcript import Word
from whisperd.speech.units import TIMESTAMP_STEP_S

PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"
SENTENCE_END = frozenset(".。!！?？")
LONGEST_MEDIAN_WORD_S = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of sampled tokens between two timestamps; seconds from the start of the window.

    ``closed`` is False where the model did not say when the last phrase ends.
    """

    start_s: float
    end_s: float
    tokens: tuple[int, ...]
    closed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestampRule:
    """Which ids are timestamps: ``begin`` is 0.00 s, each further id adds ``step_s``."""

    begin: int
    step_s: float = TIMESTAMP_STEP_S

    def is_timestamp(self, token: int) -> bool:
        """True for ids at or above ``begin``."""
        return token >= self.begin

    def seconds(self, token: int) -> float:
        """Seconds from the start of the window."""
        return round((token - self.begin) * self.step_s, 2)


def pieces(tokens: Sequence[int], rule: TimestampRule, window_s: float) -> tuple[Piece, ...]:
    """The segments of one window, in order, clipped to its real duration; those after it are dropped.

    Tokens that follow the last pair without a closing timestamp make one open piece up to ``window_s``.
    """
    found = (_piece(part, rule, window_s) for part in _parts(tokens, rule))
    return tuple(piece for piece in found if piece.start_s < window_s and piece.start_s <= piece.end_s)


def _parts(tokens: Sequence[int], rule: TimestampRule) -> Iterator[Sequence[int]]:
    begin = 0
    for index in range(1, len(tokens)):
        if rule.is_timestamp(tokens[index - 1]) and rule.is_timestamp(tokens[index]):
            yield tokens[begin:index]
            begin = index
    if any(not rule.is_timestamp(token) for token in tokens[begin:]):
        yield tokens[begin:]


def _piece(tokens: Sequence[int], rule: TimestampRule, window_s: float) -> Piece:
    start_s = rule.seconds(tokens[0]) if rule.is_timestamp(tokens[0]) else 0.0
    closed = len(tokens) > 1 and rule.is_timestamp(tokens[-1])
    end_s = min(rule.seconds(tokens[-1]), window_s) if closed else window_s
    return Piece(start_s=start_s, end_s=end_s, tokens=tuple(tokens), closed=closed)


def finished(found: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Without an open piece at the end that follows closed ones: the model broke off, and will read it again."""
    return found[:-1] if len(found) > 1 and not found[-1].closed else found


def past_audio_s(tokens: Sequence[int], rule: TimestampRule, window_s: float) -> float:
    """How far behind the end of the audio the last timestamp lies; 0 when it lies inside."""
    last = next((token for token in reversed(tokens) if rule.is_timestamp(token)), rule.begin)
    return max(0.0, rule.seconds(last) - window_s)


def covered_s(found: Sequence[Piece]) -> float:
    """Up to where the model has read the window, in seconds; an open piece reaches its end."""
    return found[-1].end_s if found else 0.0


def merge_punctuation(words: Sequence[Word]) -> list[Word]:
    """Opening punctuation joined to the word after it, closing punctuation to the word before it."""
    merged: list[Word] = []
    for word in words:
        if merged and (_closes(word.text) or _opens(merged[-1].text)):
            merged[-1] = _joined(merged[-1], word)
        else:
            merged.append(word)
    return merged


def _opens(text: str) -> bool:
    return text.startswith(" ") and text.strip() != "" and text.strip() in PREPENDED


def _closes(text: str) -> bool:
    return text != "" and not text.startswith(" ") and text in APPENDED


def _joined(first: Word, second: Word) -> Word:
    """Punctuation has no sound of its own: the times and the probability are those of the spoken part."""
    spoken = first if any(character.isalnum() for character in first.text) else second
    return replace(spoken, text=first.text + second.text)


def bound_durations(words: Sequence[Word]) -> list[Word]:
    """Words at the edges of sentences cut to twice the median: they soak up the pauses around them."""
    durations = sorted(word.end_s - word.start_s for word in words if word.end_s > word.start_s)
    median_s = min(durations[len(durations) // 2], LONGEST_MEDIAN_WORD_S) if durations else 0.0
    limit_s = 2 * median_s
    bounded: list[Word] = []
    for index, word in enumerate(words):
        if not limit_s or word.end_s - word.start_s <= limit_s:
            bounded.append(word)
        elif word.text.strip()[-1:] in SENTENCE_END or index == len(words) - 1:
            bounded.append(replace(word, end_s=word.start_s + limit_s))
        elif index == 0 or words[index - 1].text.strip()[-1:] in SENTENCE_END:
            bounded.append(replace(word, start_s=word.end_s - limit_s))
        else:
            bounded.append(word)
    return bounded


def shifted(words: Sequence[Word], offset_s: float, not_before_s: float, end_s: float) -> tuple[Word, ...]:
    """Words moved to the audio's timeline, made non-decreasing and kept within [``not_before_s``, ``end_s``]."""
    result = []
    latest_s = not_before_s
    for word in words:
        start_s = min(max(word.start_s + offset_s, latest_s), end_s)
        latest_s = min(max(word.end_s + offset_s, start_s), end_s)
        result.append(replace(word, start_s=round(start_s, 3), end_s=round(latest_s, 3)))
    return tuple(result)
