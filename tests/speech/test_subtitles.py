"""Subtitles have a readable layout and lose no word."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.service_fake import TRANSCRIPT, segment
from whisperd.speech import formats
from whisperd.speech.subtitles import Layout, cues
from whisperd.speech.transcript import Segment, Word

TEXT = (
    "After the tone, say your temporary message, and then press the pound key. I am about to attempt an Inter-Asterisk "
    "Exchange connection to a demonstration server located at Digium. Please wait."
)


@st.composite
def speech(draw: st.DrawFn) -> list[Segment]:
    """Segments in order, with or without word times."""
    found: list[Segment] = []
    at_s = 0.0
    for _ in range(draw(st.integers(0, 4))):
        texts = draw(st.lists(st.text("ab,.?", min_size=1, max_size=12), min_size=1, max_size=25))
        words = []
        for text in texts:
            at_s += draw(st.floats(0, 2))
            end_s = at_s + draw(st.floats(0, 1))
            words.append(Word(text=f" {text}", start_s=at_s, end_s=end_s, probability=1.0))
            at_s = end_s
        whole = segment(words[0].start_s, at_s, " " + " ".join(texts))
        found.append(replace(whole, words=tuple(words) if draw(st.booleans()) else None))
    return found


layouts = st.builds(Layout, line_chars=st.integers(5, 60), lines=st.integers(1, 3), max_s=st.floats(0.5, 10))


@settings(deadline=None)
@given(speech(), layouts)
def test_layout(segments: list[Segment], layout: Layout) -> None:
    """Every word occurs once, in order; only a single word exceeds the length of a line; cues do not overlap."""
    found = cues(segments, layout)
    said = [word for one in segments for word in one.text.split()]
    assert [word for cue in found for line in cue.lines for word in line.split()] == said
    for cue in found:
        assert len(cue.lines) <= layout.lines
        assert all(len(line) <= layout.line_chars or " " not in line for line in cue.lines)
        assert 0 <= cue.start_s <= cue.end_s
    assert all(before.end_s <= after.start_s for before, after in pairwise(found))


def test_sentences_and_commas() -> None:
    """Cues end with sentences, and full ones at a comma; lines are about equally long."""
    found = cues([replace(segment(0, 12, TEXT), words=None)], Layout())
    assert [cue.lines for cue in found] == [
        ("After the tone, say your temporary", "message, and then press the pound key."),
        ("I am about to attempt an Inter-Asterisk", "Exchange connection to a demonstration"),
        ("server located at Digium.",),
        ("Please wait.",),
    ]


def test_time_to_read() -> None:
    """A short cue is extended, but not into the next one; a pause ends a cue."""
    hello = Word(text=" Hello", start_s=1.0, end_s=1.2, probability=1.0)
    near = Word(text=" there", start_s=2.05, end_s=2.1, probability=1.0)
    far = Word(text=" friend", start_s=9.0, end_s=9.1, probability=1.0)
    found = cues([replace(segment(1, 10, " Hello there friend"), words=(hello, near, far))], Layout())
    assert [cue.lines for cue in found] == [("Hello",), ("there",), ("friend",)]
    assert [edge for cue in found for edge in (cue.start_s, cue.end_s)] == pytest.approx([1, 1.9, 2.05, 2.95, 9, 9.9])


def test_scripts_without_spaces() -> None:
    """Words that carry no spaces are joined without any."""
    words = tuple(
        Word(text=text, start_s=n * 0.2, end_s=n * 0.2 + 0.2, probability=1.0)
        for n, text in enumerate("日本語です。" * 3)
    )
    found = cues([replace(segment(0, 4, "日本語です。" * 3), words=words)], Layout(line_chars=8))
    assert [cue.lines for cue in found] == [("日本語です。",)] * 3


def test_files() -> None:
    """srt and vtt use the layout when there is one, hostile text included."""
    laid_out = formats.srt(replace(TRANSCRIPT, segments=(segment(0, 8, " " + TEXT),)), Layout())
    assert laid_out.startswith("1\n00:00:00,000 --> 00:00:")
    assert "After the tone, say your temporary\nmessage, and then press the pound key.\n\n2\n" in laid_out
    vtt = formats.vtt(replace(TRANSCRIPT, segments=(segment(3700, 3702, " <b>x</b> --> y"),)), Layout())
    assert "01:01:40.000 --> 01:01:42.000\n&lt;b&gt;x&lt;/b&gt; --&gt; y\n" in vtt
    times = re.findall(r"(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})", laid_out)
    assert [edge for pair in times for edge in pair] == sorted(edge for pair in times for edge in pair)


def test_a_full_cue_ends_at_its_last_comma() -> None:
    """Where a sentence is too long for a cue, the cue ends at the last comma of its second half."""
    texts = [f" word{n:02d}{',' if n == 8 else ''}" for n in range(16)]
    words = tuple(Word(text=text, start_s=n / 4, end_s=n / 4 + 0.2, probability=1.0) for n, text in enumerate(texts))
    found = cues([replace(segment(0, 4, "".join(texts)), words=words)], Layout())
    assert found[0].lines[-1].endswith("word08,")
