"""OpenAI's own client over a real Unix socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import DefaultHttpxClient, OpenAI

from tests.support.service_fake import MODEL, PATIENCE_S, TEXT, Daemon, daemon
from whisperd.errors import AudioError, EngineError, QueueFull
from whisperd.serving.interface import Readiness

AUDIO = ("talk.flac", b"fLaC and so on")


@pytest.fixture
def whisperd(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(whisperd: Daemon) -> Iterator[OpenAI]:
    transport = httpx2.HTTPTransport(uds=str(whisperd.path))
    with DefaultHttpxClient(transport=transport, timeout=PATIENCE_S) as http_client:
        yield OpenAI(base_url="http://whisperd/v1", api_key="unused", http_client=http_client, max_retries=0)


def test_json(client: OpenAI, whisperd: Daemon) -> None:
    """The default format has the text and its usage, and the service got exactly the bytes that were sent."""
    answer = client.audio.transcriptions.create(file=AUDIO, model="whisper-1")
    assert answer.text == TEXT
    assert answer.usage is not None
    assert answer.usage.to_dict() == {"type": "duration", "seconds": 4.5}
    assert [one.code for one in answer.languages or ()] == ["en"]
    assert whisperd.service.audio == [AUDIO[1]]
    assert whisperd.service.jobs[0].filename == "talk.flac"


def test_verbose_json_with_words(client: OpenAI, whisperd: Daemon) -> None:
    """Segments, words, English language name and whisperd's own additions have the SDK's types."""
    answer = client.audio.transcriptions.create(
        file=AUDIO,
        model="whisper-1",
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        prompt="Star Wars",
        temperature=0,
        extra_body={"beam_size": 5, "vad_filter": "false"},
    )
    assert (answer.text, answer.language, answer.duration) == (TEXT, "english", 4.5)
    assert answer.segments is not None
    assert [(part.id, part.start, part.end) for part in answer.segments] == [(0, 0.0, 2.0), (1, 2.5, 4.5)]
    assert answer.words is not None
    assert [word.word for word in answer.words] == ["Hello", "there.", "General", "<Kenobi>", "&", "Zoë."]
    assert answer.to_dict()["x_whisperd"]["language"] == "en"  # type: ignore[index]
    job = whisperd.service.jobs[0]
    assert (job.options.beam_size, job.options.prompt, job.chunking.vad_filter) == (5, "Star Wars", False)
    assert job.options.word_timestamps
    assert len(job.options.temperatures) == 6


def test_logprobs_and_chunking(client: OpenAI, whisperd: Daemon) -> None:
    """Token log probabilities come whole and in the deltas; the SDK's chunking object reaches the segmentation."""
    create = client.audio.transcriptions.create
    answer = create(
        file=AUDIO,
        model="gpt-4o-transcribe",
        include=["logprobs"],
        chunking_strategy={"type": "server_vad", "threshold": 0.3, "silence_duration_ms": 200},
    )
    assert answer.logprobs is not None
    assert "".join(one.token or "" for one in answer.logprobs) == " " + TEXT
    assert b"".join(bytes(map(int, one.bytes or [])) for one in answer.logprobs).decode() == " " + TEXT
    assert all(one.logprob == -0.5 for one in answer.logprobs)
    job = whisperd.service.jobs[0]
    assert (job.chunking.threshold, job.chunking.silence_ms, job.options.token_scores) == (0.3, 200, True)
    events = list(create(file=AUDIO, model="whisper-1", include=["logprobs"], stream=True))
    deltas = [one for event in events if event.type == "transcript.text.delta" for one in event.logprobs or ()]
    assert "".join(one.token or "" for one in deltas) == " " + TEXT
    last = events[-1]
    assert last.type == "transcript.text.done"
    assert [one.token for one in last.logprobs or ()] == [one.token for one in deltas]


def test_text_formats(client: OpenAI) -> None:
    """text, srt and vtt come as plain strings."""
    create = client.audio.transcriptions.create
    assert create(file=AUDIO, model="whisper-1", response_format="text") == TEXT + "\n"
    srt = create(file=AUDIO, model="whisper-1", response_format="srt")
    assert srt.startswith("1\n00:00:00,000 --> 00:00:02,000\nHello there.\n\n2\n")
    vtt = create(file=AUDIO, model="whisper-1", response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nHello there.\n\n")
    assert "General &lt;Kenobi&gt; &amp; Zoë." in vtt


def test_translation(client: OpenAI, whisperd: Daemon) -> None:
    """Translations reach the service as such; the SDK itself calls the route deprecated."""
    with pytest.warns(DeprecationWarning, match="deprecated"):
        answer = client.audio.translations.create(file=AUDIO, model="whisper-1")  # type: ignore[deprecated]
    assert answer.text == TEXT
    assert whisperd.service.jobs[0].options.task == "translate"


def test_models(client: OpenAI) -> None:
    """Models are listed, default first, and can be asked for by name and alias."""
    assert [model.id for model in client.models.list()] == [MODEL, "local"]
    assert client.models.retrieve(MODEL).owned_by == "openai"
    assert client.models.retrieve("whisper-1").id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'gone' is served here"):
        client.models.retrieve("gone")


def test_streaming(client: OpenAI) -> None:
    """Deltas add up to the text, the last event has the text, the language and the usage in tokens."""
    events = list(client.audio.transcriptions.create(file=AUDIO, model="whisper-1", stream=True))
    assert [event.type for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == TEXT
    last = events[-1]
    assert last.type == "transcript.text.done"
    assert (last.text, [one.code for one in last.languages or ()]) == (TEXT, ["en"])
    assert last.usage is not None
    assert (last.usage.type, last.usage.input_tokens, last.usage.output_tokens, last.usage.total_tokens) == (
        "tokens",
        45,
        8,
        53,
    )


def test_an_error_in_mid_stream(client: OpenAI, whisperd: Daemon) -> None:
    """A failure after the first words is raised by the SDK with our code."""
    whisperd.service.late_error = EngineError("the device is gone")
    events = client.audio.transcriptions.create(file=AUDIO, model="whisper-1", stream=True)
    with pytest.raises(openai.APIError, match="the device is gone") as caught:
        list(events)
    assert caught.value.code == "engine_error"
    whisperd.finished()


def test_an_error_before_the_stream_has_a_status(client: OpenAI, whisperd: Daemon) -> None:
    """A stream that cannot begin is an ordinary HTTP error."""
    whisperd.service.error = AudioError("no audio in it")
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(file=AUDIO, model="whisper-1", stream=True)
    assert caught.value.code == "audio_decode_error"


def test_errors_by_class(client: OpenAI, whisperd: Daemon) -> None:
    """Unknown model, full queue and loading daemon are the SDK's own exceptions, with ids and times to retry."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.audio.transcriptions.create(file=AUDIO, model="nope")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id is not None
    whisperd.service.error = QueueFull("8 requests wait", retry_after_s=0.25)
    with pytest.raises(openai.RateLimitError) as busy:
        client.audio.transcriptions.create(file=AUDIO, model="whisper-1")
    assert busy.value.code == "queue_full"
    assert (busy.value.response.headers["retry-after"], busy.value.response.headers["retry-after-ms"]) == ("1", "250")
    whisperd.service.now = Readiness(ready=False, reason="loading")
    with pytest.raises(openai.InternalServerError, match="loading") as loading:
        client.audio.transcriptions.create(file=AUDIO, model="whisper-1")
    assert (loading.value.status_code, loading.value.code) == (503, "model_loading")


def test_a_request_ends_with_the_timeout_of_its_client(client: OpenAI, whisperd: Daemon) -> None:
    """Shortly before the SDK's timeout and retry, it gets a final error; a stream continues."""
    create = client.with_options(max_retries=2).audio.transcriptions.create
    sent = client.audio.transcriptions.with_raw_response.create(file=AUDIO, model="whisper-1").http_request.headers
    assert float(sent["x-stainless-read-timeout"]) == PATIENCE_S
    whisperd.finished()
    whisperd.service.jobs.clear()
    whisperd.service.waits_first = True
    hint = {"x-stainless-read-timeout": "0.1"}
    with pytest.raises(openai.InternalServerError, match="stream=true") as caught:
        create(file=AUDIO, model="whisper-1", extra_headers=hint)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert whisperd.service.cancelled.is_set()
    assert len(whisperd.service.jobs) == 1
    whisperd.finished()
    whisperd.service.waits_first, whisperd.service.waits_last = False, True
    events = create(file=AUDIO, model="whisper-1", stream=True, extra_headers=hint)
    first = next(iter(events))
    assert first.type == "transcript.text.delta"
    whisperd.service.release()
    assert list(events)[-1].type == "transcript.text.done"


def test_a_large_upload_to_a_full_queue(client: OpenAI, whisperd: Daemon) -> None:
    """The SDK gets the refusal of a full queue before it has sent everything, and retries when there is room."""
    large = ("talk.wav", bytes(900_000))
    create = client.with_options(max_retries=5).audio.transcriptions.create
    whisperd.service.requests_max = 1
    seat = whisperd.service.backlog.enter(1)
    with pytest.raises(openai.RateLimitError) as caught:
        client.audio.transcriptions.create(file=large, model="whisper-1")
    assert caught.value.code == "queue_full"
    assert not whisperd.service.jobs
    freed = threading.Timer(0.2, seat.leave)
    freed.start()
    assert create(file=large, model="whisper-1").text == TEXT
    freed.join()


def test_the_sdk_retries_temporary_errors(client: OpenAI, whisperd: Daemon) -> None:
    """With retries on, the SDK retries after the time in the answer."""
    whisperd.service.error = QueueFull("one waits", retry_after_s=0.01)
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=1).audio.transcriptions.create(file=AUDIO, model="whisper-1")
    assert len(whisperd.service.jobs) == 2
