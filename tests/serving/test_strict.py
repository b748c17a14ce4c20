"""Every body and event passes the models of OpenAI's own client in strict validation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, TypeVar

import httpx2
import pytest
from openai.types import Model
from openai.types.audio import (
    Transcription,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
    Translation,
    TranslationVerbose,
)
from pydantic import BaseModel, TypeAdapter, ValidationError

from tests.support.api import AUDIO
from tests.support.service_fake import TEXT, TRANSCRIPT, Daemon

ROUTES = {"transcribe": "/v1/audio/transcriptions", "translate": "/v1/audio/translations"}
SILENCE = replace(TRANSCRIPT, segments=(), language="")
EVENTS: dict[str, type[BaseModel]] = {
    "transcript.text.delta": TranscriptionTextDeltaEvent,
    "transcript.text.done": TranscriptionTextDoneEvent,
}
TASKS = pytest.mark.parametrize("task", ["transcribe", "translate"])
Kind = TypeVar("Kind", bound=BaseModel)
SILENT = pytest.mark.parametrize("silent", [False, True])


def strict(kind: type[Kind], body: str) -> Kind:
    return TypeAdapter(kind).validate_json(body, strict=True)


def post(client: httpx2.Client, task: str, **fields: Any) -> httpx2.Response:
    response = client.post(ROUTES[task], files=[AUDIO], data=fields)
    assert response.status_code == 200, response.text
    return response


@TASKS
@SILENT
@pytest.mark.parametrize("include", ["", "logprobs"])
def test_json(client: httpx2.Client, whisperd: Daemon, task: str, silent: bool, include: str) -> None:
    """JSON has text, usage in seconds and requested log probabilities; a transcription names the spoken language."""
    if silent:
        whisperd.service.transcript = SILENCE
    body = post(client, task, **{"include[]": include}).text
    assert strict(Translation, body).text == ("" if silent else TEXT)
    found = strict(Transcription, body)
    assert found.usage is not None
    assert found.usage.to_dict() == {"type": "duration", "seconds": 4.5}
    assert (found.logprobs is not None) == bool(include)
    assert bool(found.logprobs) == (bool(include) and not silent)
    if task == "transcribe":
        assert found.languages is not None
        assert [one.code for one in found.languages] == ([] if silent else ["en"])
    else:
        assert found.languages is None


@TASKS
@SILENT
@pytest.mark.parametrize("granularities", [[], ["segment"], ["word"], ["word", "segment"]])
def test_verbose_json(
    client: httpx2.Client, whisperd: Daemon, task: str, silent: bool, granularities: list[str]
) -> None:
    """Words are present when requested, segments unless only words were, both also for silence."""
    if silent:
        whisperd.service.transcript = SILENCE
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": granularities}
    body = post(client, task, **fields).text
    strict(TranslationVerbose, body)
    found = strict(TranscriptionVerbose, body)
    assert (found.words is not None, found.segments is not None) == ("word" in granularities, granularities != ["word"])
    assert len(found.words or ()) == (0 if silent or "word" not in granularities else 6)
    assert len(found.segments or ()) == (0 if silent or granularities == ["word"] else 2)
    assert found.usage is not None
    assert found.usage.to_dict() == {"type": "duration", "seconds": 4.5}
    assert json.loads(body)["task"] == task


@TASKS
@SILENT
@pytest.mark.parametrize("include", ["", "logprobs"])
def test_events(client: httpx2.Client, whisperd: Daemon, task: str, silent: bool, include: str) -> None:
    """Deltas and the last event, whose usage is in tokens that add up, are valid; the stream ends as OpenAI's."""
    if silent:
        whisperd.service.transcript = SILENCE
    frames = post(client, task, stream="true", **{"include[]": include}).text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    found: list[Any] = []
    for frame in frames[:-2]:
        name, _, data = frame.partition("\ndata: ")
        found.append(strict(EVENTS[name.removeprefix("event: ")], data))
    *deltas, last = found
    assert len(deltas) == (0 if silent else 2)
    assert "".join(one.delta for one in deltas) == last.text == ("" if silent else TEXT)
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens
    assert (last.usage.input_tokens, last.usage.output_tokens) == (45, 0 if silent else 8)
    assert (last.logprobs is not None) == bool(include)
    assert (last.languages is None) == (task == "translate")


@SILENT
def test_texts(client: httpx2.Client, whisperd: Daemon, silent: bool) -> None:
    """The text formats are valid for silence, too."""
    if silent:
        whisperd.service.transcript = SILENCE
    assert post(client, "transcribe", response_format="text").text == ("\n" if silent else TEXT + "\n")
    assert bool(post(client, "transcribe", response_format="srt").text) != silent
    assert post(client, "transcribe", response_format="vtt").text.startswith("WEBVTT\n\n")


def test_models(client: httpx2.Client) -> None:
    """Each model passes OpenAI's type."""
    for card in client.get("/v1/models").json()["data"]:
        strict(Model, json.dumps(card))


def test_strict_is_strict() -> None:
    """The strict client refuses a usage in seconds in the last event, so the comparison can fail."""
    usage = {"type": "duration", "seconds": 1.0}
    with pytest.raises(ValidationError):
        strict(TranscriptionTextDoneEvent, json.dumps({"type": "transcript.text.done", "text": "", "usage": usage}))
