"""Times of segments and words."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.speech.timestamps import (
    TimestampRule,
    bound_durations,
    covered_s,
    finished,
    merge_punctuation,
    past_audio_s,
    pieces,
    shifted,
)
from whisperd.speech.transcript import Word

RULE = TimestampRule(begin=1000)


def at(seconds: float) -> int:
    return 1000 + round(seconds / 0.02)


def word(text: str, start_s: float = 0.0, end_s: float = 0.1) -> Word:
    return Word(text=text, start_s=start_s, end_s=end_s, probability=0.5)


token_lists = st.lists(st.one_of(st.integers(0, 999), st.integers(1000, 2500)), max_size=40)


@given(token_lists, st.floats(0.1, 30.0))
def test_no_text_token_is_lost_except_behind_the_end(tokens: list[int], window_s: float) -> None:
    """Every text token is in exactly one piece, except in pieces that claim to start after the audio ends."""
    found = pieces(tokens, RULE, 30.02)
    kept = [token for piece in found for token in piece.tokens if token < 1000]
    dropped_possible = any(later < earlier for earlier, later in _stamps(tokens))
    assert kept == [token for token in tokens if token < 1000] or dropped_possible
    for piece in pieces(tokens, RULE, window_s):
        assert 0 <= piece.start_s <= piece.end_s <= window_s


def _stamps(tokens: list[int]) -> list[tuple[int, int]]:
    stamps = [token for token in tokens if token >= 1000]
    return list(pairwise(stamps))


def test_pairs_of_timestamps_make_segments() -> None:
    """Two timestamps in a row end one segment and begin the next."""
    found = pieces([at(0), 5, 6, at(2.5), at(3), 7, at(4)], RULE, 10.0)
    assert [(piece.start_s, piece.end_s, piece.closed) for piece in found] == [(0.0, 2.5, True), (3.0, 4.0, True)]
    assert covered_s(found) == 4.0


def test_an_unclosed_phrase_reaches_the_end_of_the_window() -> None:
    """Text without an end timestamp ends where the window ends."""
    found = pieces([at(0), 5, at(2), at(2), 6, 7], RULE, 9.0)
    assert [(piece.start_s, piece.end_s, piece.closed) for piece in found] == [(0.0, 2.0, True), (2.0, 9.0, False)]


def test_text_without_timestamps_is_one_piece() -> None:
    """A hypothesis without any timestamp covers the window."""
    (piece,) = pieces([5, 6], RULE, 9.0)
    assert (piece.start_s, piece.end_s, piece.closed) == (0.0, 9.0, False)


def test_an_empty_hypothesis_has_no_pieces() -> None:
    """No text, or timestamps alone, give no piece."""
    assert pieces([], RULE, 9.0) == ()
    assert pieces([at(0)], RULE, 9.0) == ()
    assert covered_s(()) == 0.0


def test_segments_in_the_padding_are_dropped() -> None:
    """A phrase that starts behind the real audio is dropped as an invention."""
    assert pieces([at(0), 5, at(1), at(12), 6, at(14)], RULE, 3.0) == pieces([at(0), 5, at(1)], RULE, 3.0)


def test_punctuation_joins_its_word() -> None:
    """Closing marks join the word before, opening quotes the word after; times stay those of the sound."""
    merged = merge_punctuation([word(" Say", 0, 1), word(' "', 1, 2), word("hi", 2, 3), word(".", 3, 9)])
    assert [(w.text, w.start_s, w.end_s) for w in merged] == [(" Say", 0, 1), (' "hi.', 2, 3)]


def test_the_last_word_does_not_include_the_pause() -> None:
    """The last word of a sentence is shortened to twice the median length."""
    words = [word(" a", 0, 0.2), word(" b", 0.2, 0.4), word(" c.", 0.4, 5.0)]
    assert bound_durations(words)[-1].end_s == 0.4 + 0.4


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), max_size=20), st.floats(0, 100), st.floats(0, 30))
def test_words_are_ordered_and_inside(times: list[tuple[float, float]], offset_s: float, length_s: float) -> None:
    """Whatever the alignment is, words do not go back in time and stay inside their segment."""
    end_s = offset_s + length_s
    placed = shifted([word(" x", start, end) for start, end in times], offset_s, offset_s, end_s)
    edges = [edge for w in placed for edge in (w.start_s, w.end_s)]
    assert edges == sorted(edges)
    assert all(offset_s - 0.001 <= edge <= end_s + 0.001 for edge in edges)


def test_an_open_end_is_read_again() -> None:
    """A last piece without an end is left out when others came before it; a single one is kept."""
    both = pieces([at(0), 5, at(4), at(4), 6], RULE, 30.0)
    assert [piece.tokens for piece in finished(both)] == [(at(0), 5, at(4))]
    alone = pieces([at(0), 5, 6], RULE, 30.0)
    assert finished(alone) == alone
    assert finished(()) == ()


def test_past_audio() -> None:
    """The result is how far the last timestamp is behind the audio, whatever follows it."""
    assert past_audio_s([at(0), 5, at(28.16), at(28.16), 6], RULE, 11.0) == 17.16
    assert past_audio_s([at(0), 5, at(9)], RULE, 11.0) == 0.0
    assert past_audio_s([], RULE, 11.0) == 0.0


def test_words_around_a_pause_are_bounded() -> None:
    """The first word of a sentence is cut at its beginning, the last at its end; a long word inside is kept."""
    short = [word(f" {letter}", number * 0.2, number * 0.2 + 0.2) for number, letter in enumerate("abcdef")]
    first, inside, last = word(" G", 10.0, 15.0), word(" h", 15.0, 20.0), word(" i", 20.0, 25.0)
    bounded = bound_durations([*short[:-1], replace(short[-1], text=" f."), first, inside, last])
    assert [(w.start_s, w.end_s) for w in bounded[-3:]] == [(14.6, 15.0), (15.0, 20.0), (20.0, 20.4)]
    (alone, *_) = bound_durations([word(" A", 0.0, 9.0), *short])
    assert alone.end_s - alone.start_s == pytest.approx(0.4)


@given(st.lists(st.tuples(st.sampled_from([" a", " b.", "?", "", ' "']), st.floats(0, 20), st.floats(0, 20))))
def test_bounded_words_stay_within_themselves(found: list[tuple[str, float, float]]) -> None:
    """No text changes, and no word becomes longer or leaves the time that it had."""
    words = [word(text, start, start + length) for text, start, length in found]
    for before, after in zip(words, bound_durations(words), strict=True):
        assert after.text == before.text
        assert before.start_s <= after.start_s + 1e-9
        assert after.end_s <= before.end_s + 1e-9


@given(st.lists(st.sampled_from([" a", " b", ".", ",", ' "', '"', "", " (", "c"])))
def test_merging_loses_no_text(texts: list[str]) -> None:
    """Words and marks joined are the text that they were."""
    assert "".join(w.text for w in merge_punctuation([word(text) for text in texts])) == "".join(texts)
