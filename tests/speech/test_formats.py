"""Transcripts as files."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.support.service_fake import TEXT, TRANSCRIPT, segment
from whisperd.speech import formats
from whisperd.speech.languages import LANGUAGES
from whisperd.speech.transcript import Segment, TokenScore, Transcript, WindowStatistics, Word

CUE = re.compile(r"\d{2,}:\d\d:\d\d[.,]\d{3} --> \d{2,}:\d\d:\d\d[.,]\d{3}")

milliseconds = st.integers(0, 4_000_000).map(lambda ms: ms / 1000)
figures = st.floats(-10, 10)


@st.composite
def words_of(draw: st.DrawFn) -> tuple[Word, ...]:
    texts = draw(st.lists(st.text("abcé-", min_size=1, max_size=5), max_size=4))
    return tuple(
        Word(text=f" {text}", start_s=draw(milliseconds), end_s=draw(milliseconds), probability=draw(figures))
        for text in texts
    )


@st.composite
def segments(draw: st.DrawFn, with_words: bool) -> Segment:
    words = draw(words_of()) if with_words else None
    return Segment(
        start_s=draw(milliseconds),
        end_s=draw(milliseconds),
        text="".join(word.text for word in words) if words is not None else draw(st.text(max_size=20)),
        tokens=tuple(draw(st.lists(st.integers(0, 51_865), max_size=4))),
        temperature=draw(figures),
        avg_logprob=draw(figures),
        compression_ratio=draw(figures),
        no_speech_prob=draw(figures),
        words=words,
    )


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    return Transcript(
        task=draw(st.sampled_from(["transcribe", "translate"])),
        language=draw(st.sampled_from(sorted(LANGUAGES))),
        language_probability=draw(figures),
        duration_s=draw(milliseconds),
        segments=tuple(draw(st.lists(segments(draw(st.booleans())), max_size=3))),
        windows=WindowStatistics(decoded=draw(st.integers(0, 9)), dropped=draw(st.integers(0, 9))),
    )


@given(transcripts(), st.booleans())
def test_verbose_json_and_back(transcript: Transcript, extended: bool) -> None:
    """A round trip changes no transcript; without whisperd's own part it lacks only what OpenAI has no field for."""
    whole = formats.verbose_json(transcript)
    if extended:
        whole["x_whisperd"] = formats.extension(transcript, 1.0)
    found = formats.from_verbose_json(json.loads(json.dumps(whole)))
    if extended:
        assert found == transcript
    else:
        assert found.segments == transcript.segments
        assert found.language == ("en" if transcript.task == "translate" else transcript.language)


@given(transcripts())
def test_subtitles_have_one_cue_per_spoken_segment(transcript: Transcript) -> None:
    """No text of a segment can end its cue or begin another."""
    spoken = [one for one in transcript.segments if one.text.strip()]
    for text in (formats.srt(transcript), formats.vtt(transcript).removeprefix("WEBVTT\n\n")):
        cues = text.split("\n\n")
        assert cues.pop() == ""
        assert len(cues) == len(spoken)
        assert all(sum(map(bool, CUE.findall(cue))) == 1 for cue in cues)


def read_ms(text: str) -> list[tuple[int, int]]:
    """The times of all cues as a player parses them."""
    times = re.compile(r"(\d+):(\d\d):(\d\d)[.,](\d{3})")
    found = [times.findall(line) for line in text.splitlines() if CUE.fullmatch(line)]
    return [
        (start, end)
        for start, end in (
            [((int(h) * 60 + int(m)) * 60 + int(s)) * 1000 + int(ms) for h, m, s, ms in pair] for pair in found
        )
    ]


times_s = st.one_of(
    st.floats(0, 400_000), st.sampled_from([59.9996, 3599.9995, 3599.9994, 3600.0, 3700.0, 86_399.9999, 359_999.9999])
)


@given(st.lists(st.tuples(times_s, times_s), max_size=4))
def test_times_parse_back(pairs: list[tuple[float, float]]) -> None:
    """Past one hour, past a day and at every edge of rounding, all formats give the same whole milliseconds."""
    whole = replace(TRANSCRIPT, segments=tuple(segment(start_s, end_s, " word") for start_s, end_s in pairs))
    expected = [(round(start_s * 1000), round(end_s * 1000)) for start_s, end_s in pairs]
    rows = [tuple(map(int, row.split("\t")[:2])) for row in formats.tsv(whole).splitlines()[1:]]
    assert read_ms(formats.srt(whole)) == read_ms(formats.vtt(whole)) == rows == expected


def test_one_hour_one_minute_forty() -> None:
    """3700 s."""
    late = replace(TRANSCRIPT, segments=(segment(3700, 3701.5, " late"),))
    assert formats.srt(late) == "1\n01:01:40,000 --> 01:01:41,500\nlate\n\n"
    assert formats.vtt(late) == "WEBVTT\n\n01:01:40.000 --> 01:01:41.500\nlate\n\n"
    assert formats.tsv(late) == "start\tend\ttext\n3700000\t3701500\tlate\n"


@given(transcripts())
def test_tables_and_lines_have_one_row_per_spoken_segment(transcript: Transcript) -> None:
    """txt has a line and tsv a row of three columns for each segment that says something."""
    n_spoken = sum(bool(one.text.strip()) for one in transcript.segments)
    assert formats.txt(transcript).count("\n") == n_spoken
    rows = formats.tsv(transcript).split("\n")[1:-1]
    assert [row.count("\t") for row in rows] == [2] * n_spoken


def test_hostile_text() -> None:
    """An arrow or markup in a segment stays text."""
    hostile = replace(TRANSCRIPT, segments=(segment(0, 1, " 00:00 --> <b>x</b> &\n\nNOTE"),))
    assert formats.srt(hostile).splitlines()[2] == "00:00 -> <b>x</b> &  NOTE"
    assert formats.vtt(hostile).splitlines()[3] == "00:00 --&gt; &lt;b&gt;x&lt;/b&gt; &amp;  NOTE"


def test_plain_text_formats() -> None:
    """txt and tsv as openai-whisper writes them."""
    assert formats.txt(TRANSCRIPT) == "Hello there.\nGeneral <Kenobi> & Zoë.\n"
    assert formats.tsv(TRANSCRIPT) == ("start\tend\ttext\n0\t2000\tHello there.\n2500\t4500\tGeneral <Kenobi> & Zoë.\n")


def test_json_file() -> None:
    """json has the text, the segments with their words, and the language's code."""
    whole = json.loads(formats.json(TRANSCRIPT))
    assert (whole["text"], whole["language"]) == (TEXT, "en")
    assert [one["seek"] for one in whole["segments"]] == [0, 250]
    assert whole["segments"][0]["words"][0] == {"word": " Hello", "start": 0.0, "end": 1.0, "probability": 0.9}


def test_clock() -> None:
    """Hours are always shown and may have three digits; rounding carries over."""
    assert formats.clock(0, ".") == "00:00:00.000"
    assert formats.clock(3599.9996, ",") == "01:00:00,000"
    assert formats.clock(360_000, ".") == "100:00:00.000"


def test_a_translation_is_english() -> None:
    """OpenAI documents a translation's language as english, whatever language was spoken."""
    translated = formats.verbose_json(replace(TRANSCRIPT, task="translate", language="de"))
    assert translated["language"] == "english"
    assert formats.verbose_json(replace(TRANSCRIPT, language="de"))["language"] == "german"


def test_words_know_their_segment() -> None:
    """Words are at the top level, without spaces, with the id of their segment."""
    words = formats.verbose_json(TRANSCRIPT)["words"]
    assert [(word["word"], word["segment"]) for word in words][:3] == [("Hello", 0), ("there.", 0), ("General", 1)]


def test_short_clock() -> None:
    """On a terminal hours are written only where they are not zero."""
    assert formats.short_clock(59.9996) == "01:00.000"
    assert formats.short_clock(3600) == "01:00:00.000"


def test_logprobs() -> None:
    """Each token has its exact bytes, also for half a character that is no text; segments without scores add none."""
    scores = (TokenScore(data=b" caf\xc3", logprob=-0.5), TokenScore(data=b"\xa9", logprob=-0.1))
    scored = replace(TRANSCRIPT.segments[0], scores=scores)
    assert formats.logprobs([scored, TRANSCRIPT.segments[1]]) == [
        {"token": " caf\ufffd", "logprob": -0.5, "bytes": [32, 99, 97, 102, 195]},
        {"token": "\ufffd", "logprob": -0.1, "bytes": [169]},
    ]


def test_unknown_language() -> None:
    """A transcript of silence names no language, and the answer parses back to that."""
    silent = replace(TRANSCRIPT, language="", language_probability=0.0, segments=())
    answer = formats.verbose_json(silent) | {"x_whisperd": formats.extension(silent, 1.0)}
    assert answer["language"] == "unknown"
    assert (formats.from_verbose_json(answer).language, formats.extension(silent, 1.0)["language"]) == ("", "")
