"""From the fields of a form to the parameters of a request. Tables list the fields and the values that they take."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, get_args

from whisperd.errors import RequestError, UnsupportedParameter
from whisperd.serving.interface import Chunking
from whisperd.speech.fallback import Options
from whisperd.speech.languages import language_code, language_hint
from whisperd.speech.subtitles import Layout
from whisperd.speech.transcript import Task

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]

FORMATS: tuple[str, ...] = get_args(ResponseFormat)
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
PRIORITIES = {"auto": None, "interactive": False, "bulk": True}
CANDIDATES_MAX = 10  # beams or samples of one window: each costs its own decoder cache
TIMEOUT_MAX_S = 86_400
SHOWN_CHARACTERS = 80  # of a client's own words in a message
CHUNKING = "chunking_strategy"
CHUNKING_MEMBER = re.compile(rf"{CHUNKING}\[(\w+)\]")
CHUNKING_TYPE = "server_vad"
TRACK = re.compile(r"[0-9]{1,4}|[A-Za-z-]{2,40}", re.ASCII)
# OpenAI's name -> ours, the largest value, whether it is a whole number
CHUNKING_MEMBERS: Mapping[str, tuple[str, float, bool]] = {
    "threshold": ("threshold", 1.0, False),
    "prefix_padding_ms": ("padding_ms", 15_000, True),
    "silence_duration_ms": ("silence_ms", 60_000, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What one request asks for. A ``model`` of None is the default one, a ``bulk`` of None goes by the length.

    ``segments`` is False where only words are asked for. ``warnings``: a sentence for each field that is ignored.
    """

    options: Options
    response_format: ResponseFormat = "json"
    model: str | None = None
    chunking: Chunking = field(default_factory=Chunking)
    layout: Layout | None = None
    bulk: bool | None = None
    track: int | str | None = None
    timeout_s: float | None = None
    stream: bool = False
    segments: bool = True
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of the form. ``read`` raises ValueError for text that is not what ``expects`` describes.

    An ``array`` may be given more than once, as a JSON list, and with ``commas`` as one text with commas between its
    items; ``choices`` are all the values there are, if they can be listed.
    """

    expects: str
    read: Callable[[str], Any]
    array: bool = False
    commas: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored:
    """A field of other servers. Values for which ``is_neutral`` holds change nothing here, for the reason given.

    With another value the result would not be what was asked for: the field is refused, with ``otherwise``.
    """

    because: str
    is_neutral: Callable[[str, Task], bool] = lambda _text, _task: True
    otherwise: str = "leave it out"

    def check(self, name: str, text: str, task: Task) -> str:
        """Returns the warning; raises UnsupportedParameter when the value is not neutral."""
        if not self.is_neutral(text.strip().lower(), task):
            raise UnsupportedParameter(
                f"{_cut(name)}={_cut(text)!r} is not supported here and would change the result; {self.otherwise}",
                param=_cut(name),
            )
        return f"the field '{name.partition('[')[0]}' is ignored: {self.because}"


def parse_fields(form: Iterable[tuple[str, str]], task: Task, defaults: Options) -> Parameters:
    """Reads the parameters of a request; raises RequestError or UnsupportedParameter for the first wrong field.

    A field without a value counts as absent: many clients send all of theirs.
    """
    given: dict[str, Any] = {}
    warnings: list[str] = []
    for name, text in form:
        base = _base_name(name)
        if base in IGNORED:
            warnings += [IGNORED[base].check(name, text, task)] if text.strip() else []
            continue
        known = _field(name, base)
        if not text.strip():
            continue
        if base in OBJECTS:
            given[base] = given.get(base, {}) | _chunking_members(_cut(name), text)
        elif known.array:
            given[base] = (*given.get(base, ()), *(_value(name, known, item) for item in _items(known, text)))
        elif base in given:
            raise RequestError(f"{base} is given twice", param=_cut(name))
        else:
            given[base] = _value(name, known, text)
    return replace(_parameters(given, replace(defaults, task=task)), warnings=tuple(warnings))


def _parameters(given: Mapping[str, Any], defaults: Options) -> Parameters:
    options = replace(defaults, **{name: value for name, value in given.items() if name in OPTION_NAMES})
    if given.get("temperature"):  # 0 means the ladder, as OpenAI documents it
        options = replace(options, temperatures=(given["temperature"],))
    if "word" in given.get("timestamp_granularities", ()):
        options = replace(options, word_timestamps=True)
        _need_verbose(given.get("response_format", "json"))
    if "logprobs" in given.get("include", ()):
        options = replace(options, token_scores=True)
        _need_json(given.get("response_format", "json"))
    options = replace(options, hotwords=(*given.get("hotwords", ()), *given.get("keywords", ())))
    if len(options.languages) == 1 and options.language is None:
        options = replace(options, language=options.languages[0], languages=())
    layout = _layout(given)
    if layout is not None:
        options = replace(options, word_timestamps=True)
    return Parameters(
        options=options,
        response_format=given.get("response_format", "json"),
        model=given.get("model"),
        chunking=_chunking(given),
        layout=layout,
        bulk=PRIORITIES[given.get("priority", "auto")],
        track=given.get("audio_track"),
        timeout_s=given.get("timeout"),
        stream=given.get("stream", False),
        segments=set(given.get("timestamp_granularities", ())) != {"word"},
    )


def _layout(given: Mapping[str, Any]) -> Layout | None:
    """Readable subtitles, when a measure of them is given."""
    asked = {LAYOUT[name]: given[name] for name in LAYOUT if name in given}
    if not asked:
        return None
    if given.get("response_format") not in {"srt", "vtt"}:
        raise RequestError(f"{next(iter(LAYOUT))} needs response_format=srt or vtt", param=next(iter(LAYOUT)))
    return Layout(**asked)


def _need_verbose(response_format: str) -> None:
    if response_format != "verbose_json":
        raise RequestError(
            f"word timestamps need response_format=verbose_json, got {response_format}",
            param="timestamp_granularities[]",
        )


def _need_json(response_format: str) -> None:
    if response_format != "json":
        raise RequestError(f"logprobs need response_format=json, got {response_format}", param="include[]")


def _chunking(given: Mapping[str, Any]) -> Chunking:
    members = given.get("chunking_strategy")
    asked = Chunking(vad_filter=given.get("vad_filter"))
    return asked if members is None else replace(asked, vad_filter=given.get("vad_filter", True), **members)


def _chunking_members(name: str, text: str) -> dict[str, Any]:
    """One field of the form as members of ``Chunking``; raises RequestError."""
    member = CHUNKING_MEMBER.fullmatch(name)
    if member:
        return _chunking_member(name, member[1], text)
    if text.strip() == "auto":
        return {}
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if not isinstance(whole, dict):
        raise RequestError(
            f"{CHUNKING} must be 'auto' or an object of type {CHUNKING_TYPE}, got {text[:80]!r}", param=name
        )
    found: dict[str, Any] = {}
    for key, value in whole.items():
        found |= _chunking_member(f"{CHUNKING}[{key[:40]}]", key, value)
    return found


def _chunking_member(name: str, key: str, value: object) -> dict[str, Any]:
    if key == "type":
        if value != CHUNKING_TYPE:
            raise RequestError(f"{name} must be {CHUNKING_TYPE!r}, got {str(value)[:80]!r}", param=name)
        return {}
    if key not in CHUNKING_MEMBERS:
        raise RequestError(f"unknown field {name!r}; there are: type, {', '.join(CHUNKING_MEMBERS)}", param=name)
    ours, most, whole = CHUNKING_MEMBERS[key]
    number = _number(value)
    if number is None or not 0 <= number <= most or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name} must be {kind} from 0 to {most:g}, got {str(value)[:80]!r}", param=name)
    return {ours: int(number) if whole else number}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _base_name(name: str) -> str:
    """Returns ``name`` for ``name[]``, ``name[0]``, ``chunking_strategy[key]``: so clients write lists and objects."""
    base, bracket, key = name.partition("[")
    return base if bracket and (key[:-1].isdecimal() or key == "]" or base in OBJECTS) else name


def _field(name: str, base: str) -> Field:
    if base in INSTEAD:
        raise UnsupportedParameter(f"{_cut(name)!r} is not supported; {INSTEAD[base]}", param=_cut(name))
    if base not in FIELDS:
        near = difflib.get_close_matches(base, FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: file, {', '.join(FIELDS)}"
        raise RequestError(f"unknown field {_cut(name)!r}; {hint}", param=_cut(name))
    return FIELDS[base]


def _items(field: Field, text: str) -> Sequence[str]:
    """The items of an array that one field of the form holds."""
    with suppress(ValueError, RecursionError):
        items = json.loads(text)
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return [item for item in items if item.strip()]
    return [item.strip() for item in text.split(",") if item.strip()] if field.commas else [text]


def _value(name: str, field: Field, text: str) -> Any:
    try:
        return field.read(text)
    except UnsupportedParameter:
        raise
    except RequestError as error:  # it names the field, but not as this client has spelled it
        raise RequestError(str(error), param=_cut(name)) from error
    except ValueError as error:
        raise RequestError(f"{_cut(name)} must be {field.expects}, got {_cut(text)!r}", param=_cut(name)) from error


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _language(text: str) -> str | None:
    return None if text.strip().lower() == "auto" else language_code(_cut(text))


def _track(text: str) -> int | str:
    name = text.strip()
    if not TRACK.fullmatch(name):
        raise ValueError(text)
    return int(name) if name.isdecimal() else name.lower()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _response_format(text: str) -> str:
    if text == "diarized_json":
        raise UnsupportedParameter(
            "response_format diarized_json needs speaker labels, which whisperd does not make; "
            "verbose_json has segments with times",
            param="response_format",
        )
    return _one_of(FORMATS)(text)


def _choice(choices: Iterable[str], read: Callable[[str], Any] | None = None, **more: Any) -> Field:
    """A field with a list of values."""
    known = tuple(choices)
    return Field(expects=f"one of {', '.join(known)}", read=read or _one_of(known), choices=known, **more)


def _one_of(choices: Iterable[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return read


def _boolean(text: str) -> bool:
    value = BOOLEANS.get(text.strip().lower())
    if value is None:
        raise ValueError(text)
    return value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return read


def _between(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # false for nan, too
            raise ValueError(text)
        return value

    return read


def _is(*values: str) -> Callable[[str, Task], bool]:
    """Whether a value is one of these; numbers in any spelling."""

    def is_one(text: str, _task: Task) -> bool:
        with suppress(ValueError):
            text = f"{float(text):g}"
        return text in values

    return is_one


def _is_target(text: str, task: Task) -> bool:
    """Whether the task's output has this language; a transcription's is the spoken one, whatever it is called."""
    return task == "transcribe" or text.partition("-")[0] in {"en", "eng", "english"}


def _threshold(low: float, high: float) -> Callable[[str], float | None]:
    number = _between(low, high)
    return lambda text: None if text.strip().lower() == "none" else number(text)


OPTION_NAMES = frozenset(one.name for one in dataclass_fields(Options))
LAYOUT = {"max_line_width": "line_chars", "max_line_count": "lines"}
OBJECTS = frozenset({CHUNKING})
FIELDS: Mapping[str, Field] = {
    "model": Field(expects="the name of a model", read=str.strip),
    "language": Field(expects="a language code, an English name or 'auto'", read=_language),
    "prompt": Field(expects="text", read=str),
    "response_format": _choice(FORMATS, _response_format),
    "temperature": Field(expects="a number from 0 to 1", read=_between(0.0, 1.0)),
    "timestamp_granularities": _choice(("segment", "word"), array=True, commas=True),
    "stream": Field(expects="true or false", read=_boolean),
    "chunking_strategy": Field(expects="'auto' or an object of type server_vad", read=str),
    "include": _choice(("logprobs",), array=True, commas=True),
    "languages": Field(
        expects="a language code or an English name",
        read=lambda text: language_hint(_cut(text)),
        array=True,
        commas=True,
    ),
    "keywords": Field(expects="a word or a name", read=str.strip, array=True),
    "hotwords": Field(expects="words and names, with commas between them", read=_words),
    "vad_filter": Field(expects="true or false", read=_boolean),
    "max_line_width": Field(expects="a whole number from 10 to 200", read=_whole(10, 200)),
    "max_line_count": Field(expects="a whole number from 1 to 4", read=_whole(1, 4)),
    "priority": _choice(PRIORITIES),
    "audio_track": Field(expects="the number of an audio track, from 0, or its language", read=_track),
    "timeout": Field(expects=f"seconds from 0.1 to {TIMEOUT_MAX_S}", read=_between(0.1, TIMEOUT_MAX_S)),
    "beam_size": Field(expects=f"a whole number from 1 to {CANDIDATES_MAX}", read=_whole(1, CANDIDATES_MAX)),
    "best_of": Field(expects=f"a whole number from 1 to {CANDIDATES_MAX}", read=_whole(1, CANDIDATES_MAX)),
    "word_timestamps": Field(expects="true or false", read=_boolean),
    "no_speech_threshold": Field(expects="a number from 0 to 1, or 'none'", read=_threshold(0.0, 1.0)),
    "compression_ratio_threshold": Field(expects="a number from 0 to 100, or 'none'", read=_threshold(0.0, 100.0)),
    "log_prob_threshold": Field(expects="a number from -100 to 0, or 'none'", read=_threshold(-100.0, 0.0)),
}
OFF = _is("0", "false", "no", "off", "none")
NO_RANDOM = "whisperd takes the most probable token, and draws only where a window fails its tests"
IGNORED: Mapping[str, Ignored] = {
    "task": Ignored(
        because="the route says it",
        is_neutral=lambda text, task: text == task,
        otherwise="translations have the route /v1/audio/translations, transcriptions /v1/audio/transcriptions",
    ),
    "to_language": Ignored(
        because="transcriptions are in the language that is spoken, translations are in English",
        is_neutral=_is_target,
        otherwise="Whisper translates into English only",
    ),
    "condition_on_previous_text": Ignored(because="each window is decoded by itself"),
    "seed": Ignored(because=NO_RANDOM),
    "user": Ignored(because="nobody is billed"),
    "stream_include_usage": Ignored(because="the last event always has it"),
    "stream_continuous_usage_stats": Ignored(because="the last event has them"),
    "fp16": Ignored(because="the daemon's configuration says it (engine.compute_type)"),
    "threads": Ignored(because="the daemon's configuration says it (engine.threads_per_worker)"),
    "batch_size": Ignored(because="the daemon's configuration says it (engine.batch_size)"),
    "encode": Ignored(because="every container that ffmpeg reads is read"),
    "verbose": Ignored(because="the log has one line for each request"),
    "log_progress": Ignored(because="the log has one line for each request"),
    "n": Ignored(because="there is one transcript", is_neutral=_is("1")),
    "top_p": Ignored(because=NO_RANDOM, is_neutral=_is("1")),
    "top_k": Ignored(because=NO_RANDOM, is_neutral=_is("0", "-1")),
    "min_p": Ignored(because=NO_RANDOM, is_neutral=_is("0")),
    "frequency_penalty": Ignored(because="it is zero", is_neutral=_is("0")),
    "presence_penalty": Ignored(because="it is zero", is_neutral=_is("0")),
    "repetition_penalty": Ignored(because="it is one", is_neutral=_is("1")),
    "length_penalty": Ignored(because="it is one", is_neutral=_is("1")),
    "patience": Ignored(because="it is one", is_neutral=_is("1")),
    "no_repeat_ngram_size": Ignored(because="it is zero", is_neutral=_is("0")),
    "use_beam_search": Ignored(because="it is off", is_neutral=OFF, otherwise="set beam_size"),
    "without_timestamps": Ignored(because="it is off", is_neutral=OFF, otherwise="response_format=json has no times"),
    "diarize": Ignored(because="it is off", is_neutral=OFF, otherwise="whisperd makes no speaker labels"),
    "translate": Ignored(because="it is off", is_neutral=OFF, otherwise="use the route /v1/audio/translations"),
    "suppress_blank": Ignored(because="it is on", is_neutral=_is("1", "true", "yes", "on")),
    "suppress_tokens": Ignored(because="it is Whisper's own list", is_neutral=_is("-1")),
}
INSTEAD: Mapping[str, str] = {
    "known_speaker_names": "whisperd makes no speaker labels",
    "known_speaker_references": "whisperd makes no speaker labels",
    "initial_prompt": "it is called 'prompt' here",
}
