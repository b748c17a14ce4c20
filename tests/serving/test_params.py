"""The fields of a form: their spellings and values, and which are refused or ignored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from tests.support.api import AUDIO, URL, error_of
from tests.support.service_fake import TRANSCRIPT, Daemon
from whisperd.errors import RequestError, UnsupportedParameter
from whisperd.serving.http.params import FIELDS, IGNORED, parse_fields
from whisperd.serving.interface import Chunking
from whisperd.speech.fallback import TEMPERATURES, Options

Files = Sequence[tuple[str, tuple[str, bytes]]]


@pytest.mark.parametrize(
    ("files", "fields", "status", "code", "param", "message"),
    [
        ([("other", ("a.wav", b"x"))], {}, 400, "invalid_value", "other", "the audio belongs in 'file'"),
        ([AUDIO, AUDIO], {}, 400, "invalid_value", "file", "two files"),
        ([("file", ("a.wav", b""))], {}, 400, "invalid_value", "file", "empty"),
        ([("file", ("a.wav", b"x" * 1_000_001))], {}, 413, "file_too_large", "file", "limits.upload_bytes"),
        ([AUDIO], {"langauge": "en"}, 400, "invalid_value", "langauge", "did you mean 'language'"),
        ([AUDIO], {"zzz": "1"}, 400, "invalid_value", "zzz", "there are: file, model"),
        ([AUDIO], {"language": "germn"}, 400, "invalid_value", "language", "did you mean 'german'"),
        ([AUDIO], {"temperature": "1.5"}, 400, "invalid_value", "temperature", "a number from 0 to 1, got '1.5'"),
        ([AUDIO], {"temperature": "nan"}, 400, "invalid_value", "temperature", "a number from 0 to 1"),
        ([AUDIO], {"temperature": "hot"}, 400, "invalid_value", "temperature", "a number from 0 to 1"),
        ([AUDIO], {"response_format": "xml"}, 400, "invalid_value", "response_format", "json, text, srt"),
        ([AUDIO], {"response_format": "diarized_json"}, 400, "unsupported_parameter", "response_format", "speaker"),
        ([AUDIO], {"include[]": "pictures"}, 400, "invalid_value", "include[]", "one of logprobs"),
        (
            [AUDIO],
            {"include[]": "logprobs", "response_format": "srt"},
            400,
            "invalid_value",
            "include[]",
            "response_format=json, got srt",
        ),
        ([AUDIO], {"known_speaker_names[]": "A"}, 400, "unsupported_parameter", "known_speaker_names[]", "speaker"),
        ([AUDIO], {"languages[]": ["en", "klingon"]}, 400, "invalid_value", "languages[]", "'klingon'"),
        ([AUDIO], {"priority": "high"}, 400, "invalid_value", "priority", "auto, interactive, bulk"),
        ([AUDIO], {"chunking_strategy": "fast"}, 400, "invalid_value", "chunking_strategy", "'auto' or an object"),
        (
            [AUDIO],
            {"chunking_strategy": '{"type": "vad"}'},
            400,
            "invalid_value",
            "chunking_strategy[type]",
            "server_vad",
        ),
        (
            [AUDIO],
            {"chunking_strategy[threshold]": "1.5"},
            400,
            "invalid_value",
            "chunking_strategy[threshold]",
            "a number from 0 to 1, got '1.5'",
        ),
        (
            [AUDIO],
            {"chunking_strategy[silence]": "1"},
            400,
            "invalid_value",
            "chunking_strategy[silence]",
            "silence_duration_ms",
        ),
        ([AUDIO], {"stream": "maybe"}, 400, "invalid_value", "stream", "true or false"),
        ([AUDIO], {"beam_size": "0"}, 400, "invalid_value", "beam_size", "from 1 to 10"),
        (
            [AUDIO],
            {"timestamp_granularities[]": "word"},
            400,
            "invalid_value",
            "timestamp_granularities[]",
            "verbose_json, got json",
        ),
        ([AUDIO], {"model": ["a", "b"]}, 400, "invalid_value", "model", "given twice"),
        ([AUDIO], {"prompt": "x" * 65_537}, 400, "invalid_value", "prompt", "longer than 65536 bytes"),
        ([AUDIO], {"model": ["a"] * 65}, 400, "invalid_value", None, "more than 64 fields"),
        ([AUDIO], {"prompt": b"\xff"}, 400, "invalid_value", "prompt", "not UTF-8"),
        ([AUDIO], {"model": "nope"}, 404, "model_not_found", "model", "nope"),
    ],
)
def test_bad_requests(
    client: httpx2.Client,
    whisperd: Daemon,
    files: Files,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    message: str,
) -> None:
    """Each mistake has its status, code and field, a remedy in the message, and leaves no upload behind."""
    response = client.post(URL, files=files, data=fields)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert message in error["message"]
    assert f"POST {URL} {status} " in whisperd.finished()


FREE = {"model", "prompt", "keywords", "hotwords"}  # any text is a valid value


@pytest.mark.parametrize("name", sorted(set(FIELDS) - FREE))
def test_an_unknown_value_is_refused_with_its_field(client: httpx2.Client, whisperd: Daemon, name: str) -> None:
    """An unknown value of any field is a 400 that names the field as the client spelled it."""
    for spelled in (name, f"{name}[]"):
        response = client.post(URL, files=[AUDIO], data={spelled: "no such value"})
        assert response.status_code == 400, spelled
        assert error_of(response)["param"] == spelled
    assert not whisperd.service.jobs


ARRAYS = {
    "timestamp_granularities": ("word", "segment"),
    "include": ("logprobs",),
    "languages": ("de", "fr"),
    "keywords": ("PBX", "Zoë"),
}


def test_arrays_in_both_spellings_and_parts_in_both_orders(client: httpx2.Client, whisperd: Daemon) -> None:
    """Python sends the file last, Node first, curl users omit the brackets: all make the same job."""
    assert set(ARRAYS) == {name for name, field in FIELDS.items() if field.array}
    for name, values in ARRAYS.items():
        response_format = "json" if name == "include" else "verbose_json"
        found = []
        for spelled in (name, f"{name}[]"):
            fields = [(spelled, (None, value.encode())) for value in values]
            fields.append(("response_format", (None, response_format.encode())))
            for parts in ([AUDIO, *fields], [*fields, AUDIO]):
                assert client.post(URL, files=parts).status_code == 200
                job = whisperd.service.jobs[-1]
                found.append((job.options, job.chunking, job.model, whisperd.service.audio[-1]))
        assert found == found[:1] * 4
        assert found[0][0] != Options(), name


def parse(*form: tuple[str, str], defaults: Options | None = None) -> Options:
    return parse_fields(form, "transcribe", defaults or Options()).options


def test_temperature_zero_is_the_ladder() -> None:
    """0 keeps the configured ladder, anything above is the only temperature."""
    assert parse(("temperature", "0")).temperatures == TEMPERATURES
    assert parse(("temperature", "0.4")).temperatures == (0.4,)
    assert parse(("temperature", "0.0"), defaults=Options(temperatures=(0.0, 0.5))).temperatures == (0.0, 0.5)


def test_languages() -> None:
    """Codes and names are accepted; auto means detection, an absent field means the configuration."""
    german = Options(language="de")
    assert parse(("language", "French")).language == "fr"
    assert parse(("language", "auto"), defaults=german).language is None
    assert parse(("language", ""), defaults=german).language == "de"


def test_three_spellings_of_chunking() -> None:
    """A word, a JSON object and one field for each member mean the same."""
    wanted = Chunking(vad_filter=True, threshold=0.4, padding_ms=100, silence_ms=300)
    members = {"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 100, "silence_duration_ms": 300}
    spelled = [(f"chunking_strategy[{name}]", str(value)) for name, value in members.items()]
    for form in (spelled, list(reversed(spelled)), [("chunking_strategy", json.dumps(members))]):
        assert parse_fields(form, "transcribe", Options()).chunking == wanted
    assert parse_fields([("chunking_strategy", "auto")], "transcribe", Options()).chunking == Chunking(vad_filter=True)
    off = [("chunking_strategy", "auto"), ("vad_filter", "false")]
    assert parse_fields(off, "transcribe", Options()).chunking == Chunking(vad_filter=False)


def test_hints() -> None:
    """Keywords and hotwords are one list, several languages restrict the detection, a single one replaces it."""
    options = parse(("keywords[]", "PBX"), ("keywords[]", "Zoë"), ("hotwords", "Asterisk, Digium"))
    assert options.hotwords == ("Asterisk", "Digium", "PBX", "Zoë")
    assert parse(("keywords", "PBX")).hotwords == ("PBX",)
    several = parse(("languages[]", "de"), ("languages[]", "French"))
    assert (several.language, several.languages) == (None, ("de", "fr"))
    single = parse(("languages", "de"))
    assert (single.language, single.languages) == ("de", ())


def test_thresholds_can_be_switched_off() -> None:
    """'none' switches a safeguard off, a number sets it."""
    options = parse(("no_speech_threshold", "none"), ("log_prob_threshold", "-0.5"))
    assert (options.no_speech_threshold, options.log_prob_threshold) == (None, -0.5)


def test_every_field_takes_an_empty_value() -> None:
    """Clients that send all their fields, most of them empty, get the defaults."""
    found = parse_fields([(name, "") for name in FIELDS], "translate", Options())
    assert found.options == Options(task="translate")
    assert (found.model, found.chunking, found.stream, found.response_format) == (None, Chunking(), False, "json")


def test_long_values_are_cut_in_messages() -> None:
    """A client's own words are shortened in messages."""
    with pytest.raises(RequestError) as caught:
        parse(("x" * 60_000, "1"))
    assert len(str(caught.value)) < 500
    with pytest.raises(UnsupportedParameter, match="it is called 'prompt' here"):
        parse(("initial_prompt", "x"))


GRANULARITIES = [
    [("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment")],
    [("timestamp_granularities", "word"), ("timestamp_granularities", "segment")],
    [("timestamp_granularities[0]", "word"), ("timestamp_granularities[1]", "segment")],
    [("timestamp_granularities", '["word", "segment"]')],
    [("timestamp_granularities[]", '["word","segment"]')],
    [("timestamp_granularities", "word,segment")],
    [("timestamp_granularities[]", "word, segment")],
]


@pytest.mark.parametrize("form", GRANULARITIES)
def test_spellings_of_a_list(form: list[tuple[str, str]]) -> None:
    """Brackets, numbered brackets, a JSON list and commas mean the same."""
    found = parse_fields([("response_format", "verbose_json"), *form], "transcribe", Options())
    assert (found.options.word_timestamps, found.segments) == (True, True)


def test_lists() -> None:
    """An empty list is none, other lists are spelled in the same ways, and commas are part of a keyword."""
    for empty in ("[]", " [ ] ", '[""]', ","):
        found = parse_fields([("timestamp_granularities", empty)], "transcribe", Options())
        assert (found.options.word_timestamps, found.segments) == (False, True)
    words = [("timestamp_granularities", "word"), ("response_format", "verbose_json")]
    assert not parse_fields(words, "transcribe", Options()).segments
    assert parse(("languages", "de,fr")).languages == parse(("languages[0]", "de"), ("languages[1]", "fr")).languages
    assert parse(("keywords", '["PBX", "Smith, John"]')).hotwords == ("PBX", "Smith, John")
    assert parse(("keywords[0]", "Smith, John"), ("keywords[1]", "[sic]")).hotwords == ("Smith, John", "[sic]")
    for wrong in ("[1]", "[word", "word;segment"):
        with pytest.raises(RequestError, match="one of segment, word"):
            parse(("timestamp_granularities", wrong))
    with pytest.raises(RequestError, match=r"unknown field 'timestamp_granularities\[x\]'"):
        parse(("timestamp_granularities[x]", "word"))


def test_hints_of_languages_that_whisper_lacks() -> None:
    """An unknown code stays a hint, which the model ignores with a warning; an unknown name is a mistake."""
    assert parse(("languages[]", "ga"), ("languages[]", "nb-NO"), ("languages[]", "iw")).languages == ("ga", "no", "he")
    with pytest.raises(RequestError, match="unknown language 'klingon'"):
        parse(("languages[]", "klingon"))


HARMLESS = {
    "task": "transcribe", "condition_on_previous_text": "false", "seed": "7", "to_language": "de", "user": "u-1",
    "stream_include_usage": "true", "stream_continuous_usage_stats": "false", "fp16": "True", "threads": "4",
    "batch_size": "8", "encode": "true", "verbose": "False", "log_progress": "false", "n": "1", "top_p": "1.0",
    "top_k": "-1", "min_p": "0", "frequency_penalty": "0.0", "presence_penalty": "0", "repetition_penalty": "1",
    "length_penalty": "1.0", "patience": "1", "no_repeat_ngram_size": "0", "use_beam_search": "false",
    "without_timestamps": "False", "diarize": "false", "translate": "false", "suppress_blank": "true",
    "suppress_tokens": "-1",
}  # fmt: skip
HARMFUL = {
    "task": "translate", "n": "2", "top_p": "0.9", "top_k": "5", "min_p": "0.1", "frequency_penalty": "0.5",
    "presence_penalty": "1", "repetition_penalty": "1.2", "length_penalty": "0.5", "patience": "2",
    "no_repeat_ngram_size": "3", "use_beam_search": "true", "without_timestamps": "true", "diarize": "true",
    "translate": "true", "suppress_blank": "false", "suppress_tokens": "1,2",
}  # fmt: skip


def test_every_ignored_field_is_tried() -> None:
    """The table below lists all ignored fields, and none is a field that is read."""
    assert set(HARMLESS) == set(IGNORED)
    assert not set(IGNORED) & set(FIELDS)


def test_harmless_fields_of_other_servers(client: httpx2.Client) -> None:
    """Such fields change nothing, and header and body list them as ignored."""
    plain = client.post(URL, files=[AUDIO], data={"response_format": "verbose_json"})
    assert "x-whisperd-warning" not in plain.headers
    for name, text in HARMLESS.items():
        response = client.post(URL, files=[AUDIO], data={name: text, "response_format": "verbose_json"})
        assert response.status_code == 200, response.text
        assert response.headers["x-whisperd-warning"].startswith(f"the field '{name}' is ignored: ")
        (warning,) = response.json()["warnings"]
        assert warning == response.headers["x-whisperd-warning"]
        assert response.json()["segments"] == plain.json()["segments"]


def test_fields_that_would_change_the_result(client: httpx2.Client, whisperd: Daemon) -> None:
    """Such fields are refused by name, with a remedy."""
    for name, text in HARMFUL.items():
        response = client.post(URL, files=[AUDIO], data={name: text})
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
        assert "would change the result" in error["message"]
    assert not whisperd.service.jobs


def test_targets_of_a_translation(client: httpx2.Client) -> None:
    """Whisper translates into English; another target is refused, and the task must be the route's."""
    route = "/v1/audio/translations"
    for fields in ({"to_language": "en"}, {"to_language": "English"}, {"task": "translate"}):
        assert client.post(route, files=[AUDIO], data=fields).headers["x-whisperd-warning"]
    for wrong in ({"to_language": "de"}, {"task": "transcribe"}):
        assert error_of(client.post(route, files=[AUDIO], data=wrong))["code"] == "unsupported_parameter"


def test_several_warnings(client: httpx2.Client, whisperd: Daemon) -> None:
    """Warnings on fields and on the audio are combined in header, body, last event and log."""
    whisperd.service.transcript = replace(TRANSCRIPT, warnings=("the audio ends at 3.0 s \u2013 of 7.2 s",))
    response = client.post(URL, files=[AUDIO], data={"seed": "1"})
    ignored, cut = response.json()["warnings"]
    assert "'seed'" in ignored
    assert cut == "the audio ends at 3.0 s \u2013 of 7.2 s"
    assert response.headers["x-whisperd-warning"] == f"{ignored}; the audio ends at 3.0 s ? of 7.2 s"
    assert whisperd.finished().endswith(f"; warning: {ignored}; warning: {cut}")
    streamed = client.post(URL, files=[AUDIO], data={"seed": "1", "stream": "true"})
    assert streamed.headers["x-whisperd-warning"] == ignored
    done = json.loads(streamed.text.split("\n\n")[-3].partition("data: ")[2])
    assert (done["type"], done["warnings"]) == ("transcript.text.done", [ignored, cut])
