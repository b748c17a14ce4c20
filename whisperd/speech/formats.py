"""What a transcript looks like as a file or an answer: txt, srt, vtt, tsv, json and OpenAI's verbose_json. Pure.

The text formats follow openai-whisper's writers, except that hours are always written and nothing in a text can end
a cue early. Empty segments make no cue.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from whisperd.speech.languages import LANGUAGES, language_code
from whisperd.speech.subtitles import Cue, Layout, cues
from whisperd.speech.transcript import Segment, Transcript, WindowStatistics, Word

UNKNOWN = "unknown"  # the language of audio in which nobody speaks
SEEK_FRAMES_PER_S = 100  # Whisper counts time in mel frames of 10 ms


def txt(transcript: Transcript) -> str:
    """One segment a line."""
    return "".join(f"{line}\n" for _, line in _cues(transcript))


def srt(transcript: Transcript, layout: Layout | None = None) -> str:
    """SubRip; cues are numbered from 1. With a layout they are made to be read, else each segment is one."""
    return "".join(
        f"{number}\n{clock(cue.start_s, ',')} --> {clock(cue.end_s, ',')}\n{_lines(cue).replace('-->', '->')}\n\n"
        for number, cue in enumerate(_subtitles(transcript, layout), start=1)
    )


def vtt(transcript: Transcript, layout: Layout | None = None) -> str:
    """WebVTT; the characters that WebVTT gives a meaning are escaped. The layout is as in ``srt``."""
    return "WEBVTT\n\n" + "".join(
        f"{clock(cue.start_s, '.')} --> {clock(cue.end_s, '.')}\n{_escape(_lines(cue))}\n\n"
        for cue in _subtitles(transcript, layout)
    )


def tsv(transcript: Transcript) -> str:
    """Start and end in whole milliseconds and the text, with a header line."""
    rows = (
        (str(_ms(segment.start_s)), str(_ms(segment.end_s)), line.replace("\t", " "))
        for segment, line in _cues(transcript)
    )
    return "start\tend\ttext\n" + "".join("\t".join(row) + "\n" for row in rows)


def json(transcript: Transcript) -> str:
    """The file that openai-whisper's command line writes: text, segments (with their words) and a language code."""
    whole = {
        "text": transcript.text,
        "segments": [segment_dict(number, segment) for number, segment in enumerate(transcript.segments)],
        "language": transcript.language,
    }
    return jsonlib.dumps(whole, ensure_ascii=False) + "\n"


def clock(time_s: float, point: str) -> str:
    """``HH:MM:SS.mmm`` with ``point`` before the milliseconds, rounded to the nearest one."""
    seconds, ms = divmod(_ms(time_s), 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{ms:03d}"


def short_clock(time_s: float) -> str:
    """``MM:SS.mmm``, with hours only where there are any, as openai-whisper prints times on a terminal."""
    return clock(time_s, ".").removeprefix("00:")


def segment_dict(number: int, segment: Segment) -> dict[str, Any]:
    """A segment in the shape that openai-whisper and OpenAI share; its words are inside when it has any."""
    whole: dict[str, Any] = {
        "id": number,
        "seek": int(segment.start_s * SEEK_FRAMES_PER_S),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }
    if segment.words is not None:
        whole["words"] = [_word_dict(word, word.text) for word in segment.words]
    return whole


def verbose_json(transcript: Transcript) -> dict[str, Any]:
    """OpenAI's ``verbose_json``: the language by its English name, words at the top.

    A translation's language is "english", as OpenAI documents it. Each word carries two keys more than OpenAI's: its
    ``probability`` and the id of its ``segment``.
    """
    segments = [segment_dict(number, segment) for number, segment in enumerate(transcript.segments)]
    spoken = LANGUAGES.get(transcript.language, transcript.language) or UNKNOWN
    whole: dict[str, Any] = {
        "task": transcript.task,
        "language": "english" if transcript.task == "translate" else spoken,
        "duration": round(transcript.duration_s, 3),
        "text": transcript.text,
        "segments": [{key: value for key, value in segment.items() if key != "words"} for segment in segments],
    }
    if any(segment.words is not None for segment in transcript.segments):
        whole["words"] = [
            _word_dict(word, word.text.strip()) | {"segment": number}
            for number, segment in enumerate(transcript.segments)
            for word in segment.words or ()
        ]
    return whole


def extension(transcript: Transcript, wall_s: float) -> dict[str, Any]:
    """What whisperd knows beyond OpenAI's shape; the value of ``x_whisperd`` in an answer."""
    windows = transcript.windows
    return {
        "language": transcript.language,
        "language_probability": transcript.language_probability,
        "windows": {
            "decoded": windows.decoded,
            "retried": windows.retried,
            "dropped": windows.dropped,
            "continued": windows.continued,
            "halved": windows.halved,
        },
        "wall_s": round(wall_s, 3),
    }


def logprobs(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """OpenAI's list of tokens with their log probabilities; ``bytes`` are exact where ``token`` cannot be."""
    return [
        {"token": score.data.decode(errors="replace"), "logprob": score.logprob, "bytes": list(score.data)}
        for segment in segments
        for score in segment.scores or ()
    ]


def from_verbose_json(whole: Mapping[str, Any]) -> Transcript:
    """The transcript behind a whisperd answer; the inverse of ``verbose_json`` up to whole milliseconds."""
    words = whole.get("words")
    own = whole.get("x_whisperd", {})
    return Transcript(
        task=whole["task"],
        language=own["language"] if "language" in own else language_code(whole["language"]),
        language_probability=own.get("language_probability", 1.0),
        duration_s=whole["duration"],
        segments=tuple(_segment(segment, words) for segment in whole["segments"]),
        windows=WindowStatistics(**own.get("windows", {})),
        warnings=tuple(whole.get("warnings", ())),
    )


def _segment(one: Mapping[str, Any], words: Iterable[Mapping[str, Any]] | None) -> Segment:
    mine = None if words is None else [word for word in words if word["segment"] == one["id"]]
    return Segment(
        start_s=one["start"],
        end_s=one["end"],
        text=one["text"],
        tokens=tuple(one["tokens"]),
        temperature=one["temperature"],
        avg_logprob=one["avg_logprob"],
        compression_ratio=one["compression_ratio"],
        no_speech_prob=one["no_speech_prob"],
        words=None if mine is None else tuple(_words(mine, one["text"])),
    )


def _words(words: Iterable[Mapping[str, Any]], text: str) -> Iterator[Word]:
    """OpenAI's words have no space around them; the segment's text knows where it was."""
    at = 0
    for word in words:
        found = text.find(word["word"], at)
        end = found + len(word["word"]) if found >= 0 else at
        yield Word(
            text=text[at:end] if found >= 0 else word["word"],
            start_s=word["start"],
            end_s=word["end"],
            probability=word["probability"],
        )
        at = end


def _word_dict(word: Word, text: str) -> dict[str, Any]:
    start_s, end_s = round(word.start_s, 3), round(word.end_s, 3)
    return {"word": text, "start": start_s, "end": end_s, "probability": word.probability}


def _cues(transcript: Transcript) -> Iterator[tuple[Segment, str]]:
    for segment in transcript.segments:
        line = " ".join(segment.text.splitlines()).strip()
        if line:
            yield segment, line


def _subtitles(transcript: Transcript, layout: Layout | None) -> list[Cue]:
    if layout is not None:
        return cues(transcript.segments, layout)
    return [Cue(start_s=one.start_s, end_s=one.end_s, lines=(line,)) for one, line in _cues(transcript)]


def _lines(cue: Cue) -> str:
    return "\n".join(" ".join(line.splitlines()) for line in cue.lines)


def _escape(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _ms(time_s: float) -> int:
    return round(time_s * 1000)
