"""Subtitles that can be read: short lines, few of them, on the screen for long enough. Pure.

Whisper's segments are phrases of up to half a minute. Here their words are put together anew: a cue ends at the end of
a sentence, at a pause, or where it is full; a full one is cut at a comma when there is one in its second half. Without
word times a segment's time is shared out by the length of its words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from whisperd.speech.transcript import Segment, Word

SENTENCE_ENDS = (".", "?", "!", "。", "？", "！", "…")
CLAUSE_ENDS = (*SENTENCE_ENDS, ",", ";", ":", "、", "，", "；", "：")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a reader can take in. A cue stays until it can be read, unless the next one comes before."""

    line_chars: int = 42
    lines: int = 2
    chars_per_s: float = 20.0
    min_s: float = 0.9
    max_s: float = 6.0
    pause_s: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """One subtitle; ``lines`` have no space at their ends."""

    start_s: float
    end_s: float
    lines: tuple[str, ...]


def cues(segments: Iterable[Segment], layout: Layout) -> list[Cue]:
    """The words of all segments in order, none lost, as cues that do not overlap."""
    groups = list(_groups(_words(segments), layout))
    starts = [*(group[0].start_s for group in groups[1:]), float("inf")]
    return [_cue(group, next_start_s, layout) for group, next_start_s in zip(groups, starts, strict=False)]


def _words(segments: Iterable[Segment]) -> list[Word]:
    """Words in order of time; none begins before the one before it."""
    ordered: list[Word] = []
    latest_s = 0.0
    for segment in segments:
        for word in segment.words or _shared_out(segment):
            latest_s = max(latest_s, word.start_s)
            end_s = max(latest_s, word.end_s)
            ordered.append(Word(text=word.text, start_s=latest_s, end_s=end_s, probability=word.probability))
    return [word for word in ordered if word.text.strip()]


def _shared_out(segment: Segment) -> Iterator[Word]:
    texts = [f" {text}" for text in segment.text.split()]
    total = sum(map(len, texts))
    at = 0
    for text in texts:
        spans = [segment.start_s + (segment.end_s - segment.start_s) * (at + n) / total for n in (0, len(text))]
        yield Word(text=text, start_s=spans[0], end_s=spans[1], probability=1.0)
        at += len(text)


def _groups(words: Sequence[Word], layout: Layout) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group and _ends_before(group, word, layout):
            yield group
            group = []
        while group and not _fits([*group, word], layout):
            cut = _cut(group)
            yield group[:cut]
            group = group[cut:]
        group.append(word)
    if group:
        yield group


def _ends_before(group: Sequence[Word], word: Word, layout: Layout) -> bool:
    """A pause, or the end of a sentence that stood long enough."""
    if word.start_s - group[-1].end_s >= layout.pause_s:
        return True
    return _ends_with(group[-1], SENTENCE_ENDS) and group[-1].end_s - group[0].start_s >= layout.min_s


def _fits(group: Sequence[Word], layout: Layout) -> bool:
    if group[-1].end_s - group[0].start_s > layout.max_s:
        return False
    return len(wrapped(group, layout.line_chars)) <= layout.lines


def _cut(group: Sequence[Word]) -> int:
    """How many words of a full cue stay in it: up to the last comma of its second half, else all."""
    for index in range(len(group) - 1, len(group) // 2, -1):
        if _ends_with(group[index - 1], CLAUSE_ENDS):
            return index
    return len(group)


def wrapped(group: Sequence[Word], line_chars: int) -> tuple[str, ...]:
    """Lines of at most ``line_chars``, as few as can be and about equally long; a longer word has its own line."""
    narrowest = _filled(group, line_chars)
    for width in range(1, line_chars):
        lines = _filled(group, width)
        if len(lines) == len(narrowest) and all(len(line) <= line_chars for line in lines):
            return lines
    return narrowest


def _filled(group: Sequence[Word], width: int) -> tuple[str, ...]:
    lines: list[str] = []
    for word in group:
        if lines and len((lines[-1] + word.text).strip()) <= width:
            lines[-1] += word.text
        else:
            lines.append(word.text)
    return tuple(line.strip() for line in lines)


def _ends_with(word: Word, marks: tuple[str, ...]) -> bool:
    return word.text.rstrip("\"'”’)»").endswith(marks)


def _cue(group: Sequence[Word], next_start_s: float, layout: Layout) -> Cue:
    lines = wrapped(group, layout.line_chars)
    start_s = group[0].start_s
    readable_s = max(layout.min_s, sum(map(len, lines)) / layout.chars_per_s)
    end_s = min(next_start_s, max(group[-1].end_s, start_s + readable_s))
    return Cue(start_s=start_s, end_s=end_s, lines=lines)
