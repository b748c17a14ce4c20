"""A hypothesis in its window becomes figures, segments and words; none is lost, invented or out of order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.engine.base import Hypothesis, TokenTime
from whisperd.speech.fallback import compression_ratio
from whisperd.speech.timestamps import Piece
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.transcript import Segment
from whisperd.speech.units import Span
from whisperd.transcription.segments import PROBABILITY_MIN, SegmentBuilder, remainder, split

START_S = 100.0
WINDOW_S = 20.0
SPAN = Span(1_600_000, 1_920_000)  # of WINDOW_S from START_S


def hypothesis_of(tokens: Sequence[int], *, times: Sequence[TokenTime] | None = None) -> Hypothesis:
    return Hypothesis(
        window_id=1,
        language="en",
        language_probability=1.0,
        tokens=tuple(tokens),
        avg_logprob=-0.3,
        no_speech_prob=0.1,
        temperature=0.2,
        alignment=None if times is None else tuple(times),
    )


def timed(tokens: Sequence[int], probability: float = 0.9) -> list[TokenTime]:
    """Half a second for each token, one after the other."""
    return [
        TokenTime(token=token, start_s=index / 2, end_s=(index + 1) / 2, probability=probability)
        for index, token in enumerate(tokens)
    ]


@pytest.fixture
def phrase(vocabulary: Vocabulary) -> Hypothesis:
    """Two phrases: 0 to 2 s and 4 to 6 s."""
    begin, hello, world = vocabulary.timestamp_begin, vocabulary.encode(" Hello."), vocabulary.encode(" World!")
    tokens = (begin, *hello, begin + 100, begin + 200, *world, begin + 300)
    return hypothesis_of(tokens, times=timed([*hello, *world]))


def built(builder: SegmentBuilder, found: Hypothesis, window_s: float = WINDOW_S) -> list[Segment]:
    attempt = builder.figures(found, window_s)
    pieces = builder.pieces(found, window_s)
    return list(builder.segments(pieces, attempt, found, start_s=START_S, language="en"))


def test_segments_lie_in_the_audio(vocabulary: Vocabulary, phrase: Hypothesis) -> None:
    """Segments have the times of the audio and the figures of the attempt."""
    first, second = built(SegmentBuilder(vocabulary=vocabulary), phrase)
    assert (first.text, first.start_s, first.end_s) == (" Hello.", 100.0, 102.0)
    assert (second.text, second.start_s, second.end_s) == (" World!", 104.0, 106.0)
    assert (first.avg_logprob, first.no_speech_prob, first.temperature) == (-0.3, 0.1, 0.2)
    assert (first.words, first.scores) == (None, None)


def test_words_and_scores(vocabulary: Vocabulary, phrase: Hypothesis) -> None:
    """Each segment has the words and scores of its own tokens, punctuation with its word."""
    first, second = built(SegmentBuilder(vocabulary=vocabulary, words=True, scores=True), phrase)
    assert [word.text for word in first.words or ()] == [" Hello."]
    assert [word.text for word in second.words or ()] == [" World!"]
    assert b"".join(score.data for score in second.scores or ()) == b" World!"
    assert all(score.logprob == pytest.approx(math.log(0.9)) for score in first.scores or ())


def test_a_probability_of_zero_has_a_logarithm(vocabulary: Vocabulary) -> None:
    """A probability that was rounded to 0 does not break the answer."""
    tokens = vocabulary.encode(" x")
    (segment,) = built(
        SegmentBuilder(vocabulary=vocabulary, scores=True), hypothesis_of(tokens, times=timed(tokens, 0))
    )
    assert [score.logprob for score in segment.scores or ()] == [math.log(PROBABILITY_MIN)] * len(tokens)


def test_without_alignment(vocabulary: Vocabulary, phrase: Hypothesis) -> None:
    """An engine without token times gives segments without words, not without text."""
    segments = built(SegmentBuilder(vocabulary=vocabulary, words=True), replace(phrase, alignment=None))
    assert [(segment.text, segment.words) for segment in segments] == [(" Hello.", ()), (" World!", ())]


def test_a_piece_without_text_is_no_segment(vocabulary: Vocabulary) -> None:
    """A pair of timestamps around nothing is left out."""
    begin = vocabulary.timestamp_begin
    found = hypothesis_of((begin, begin + 50, begin + 50, *vocabulary.encode(" Yes"), begin + 100))
    assert [segment.text for segment in built(SegmentBuilder(vocabulary=vocabulary), found)] == [" Yes"]


def test_figures_take_the_worst_part(vocabulary: Vocabulary) -> None:
    """The figures show a loop in one segment, however varied the text before it is."""
    begin, loop = vocabulary.timestamp_begin, vocabulary.encode(" again and again" * 20)
    varied = vocabulary.encode(" Sphinx of black quartz, judge my vow; pack my box with five dozen liquor jugs.")
    found = hypothesis_of((begin, *varied, begin + 200, begin + 200, *loop, begin + 1600))
    attempt = SegmentBuilder(vocabulary=vocabulary).figures(found, 30.0)
    assert attempt.compression_ratio == compression_ratio(vocabulary.decode(loop))
    assert attempt.past_audio_s == pytest.approx(2.0)
    assert not attempt.looped


def test_remainder() -> None:
    """The rest of a window counts only with a second of speech in it, and only if the model advanced at all."""
    span, speech = Span(0, 160_000), (Span(0, 80_000), Span(120_000, 150_000))
    assert remainder(span, speech, 5.0) == Span(80_000, 160_000)
    assert remainder(span, speech, 9.0) is None
    assert remainder(span, speech, 0.5) is None


def test_an_open_piece_goes_to_the_rest() -> None:
    """Where speech goes on, an open last piece is decoded again; where it does not, the piece is kept."""
    closed = Piece(start_s=0.0, end_s=5.0, tokens=(1,), closed=True)
    left_open = Piece(start_s=5.0, end_s=20.0, tokens=(2,), closed=False)
    speech = (Span(1_600_000, 1_900_000),)
    assert split((closed, left_open), SPAN, speech) == ((closed,), Span(1_680_000, 1_920_000))
    assert split((closed, left_open), SPAN, (Span(1_600_000, 1_690_000),)) == ((closed, left_open), None)


@st.composite
def written_tokens(draw: st.DrawFn, vocabulary: Vocabulary) -> list[int]:
    """Text tokens and timestamps in any order; timestamps never decrease, which the engines ensure."""
    begin = vocabulary.timestamp_begin
    token = st.one_of(st.integers(0, vocabulary.eot - 1), st.integers(begin, begin + 1500))
    tokens = draw(st.lists(token, max_size=40))
    times = iter(sorted(token for token in tokens if token >= begin))
    return [token if token < begin else next(times) for token in tokens]


@given(data=st.data())
def test_any_hypothesis(data: st.DataObject, vocabulary: Vocabulary) -> None:
    """Segments are inside the window, words inside their segment and in order, and scores belong to its text."""
    tokens = data.draw(written_tokens(vocabulary))
    window_s = data.draw(st.floats(0.02, 30))
    found = hypothesis_of(tokens, times=timed([token for token in tokens if token < vocabulary.eot]))
    for segment in built(SegmentBuilder(vocabulary=vocabulary, words=True, scores=True), found, window_s):
        assert START_S <= segment.start_s <= segment.end_s <= round(START_S + window_s, 3)
        assert segment.text.strip()
        assert segment.text == vocabulary.decode(segment.tokens)
        edges = [time for word in segment.words or () for time in (word.start_s, word.end_s)]
        assert edges == sorted(edges)
        assert all(segment.start_s <= edge <= segment.end_s for edge in edges)
        assert b"".join(score.data for score in segment.scores or ()).decode(errors="replace") == segment.text
