"""OpenAI's client and bare sockets against a real daemon, with real weights and real speech."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator

import httpx2
import openai
import pytest
from openai import DefaultHttpxClient, OpenAI
from wyoming.asr import Transcribe
from wyoming.client import AsyncUnixClient

from tests.integration.test_wyoming import pcm, transcribed
from tests.support.daemon import EMBEDDED, PATIENCE_S, DaemonProcess, running
from tests.support.speech import Clip, plain
from tests.support.wait import until

URL = "/v1/audio/transcriptions"
PROMPT = "Quetzalcoatl"  # words that occur nowhere else in a log
HOTWORD = "Xylophonist"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with the most detailed log, and room for one request at a time."""
    directory = tmp_path_factory.mktemp("api")
    config = f'models = ["{EMBEDDED}"]\nlog_level = "debug"\n[limits]\nrequests = 1'
    with running(directory, config, arguments=["-o", f'server.wyoming="unix:{directory}/wyoming"']) as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[OpenAI]:
    transport = httpx2.HTTPTransport(uds=str(daemon.socket_path))
    with DefaultHttpxClient(transport=transport, timeout=PATIENCE_S) as http_client:
        yield OpenAI(base_url="http://whisperd/v1", api_key="unused", http_client=http_client, max_retries=0)


def test_verbose_json(client: OpenAI, clips: dict[str, Clip]) -> None:
    """Times rise and only the first may be zero, the language is detected, and words come when requested."""
    with clips["instruct"].path.open("rb") as file:
        found = client.audio.transcriptions.create(
            file=file, model="whisper-1", response_format="verbose_json", timestamp_granularities=["word", "segment"]
        )
    assert found.language == "english"
    assert 73 < found.duration < 74
    assert found.segments is not None
    assert found.words is not None
    assert len(found.segments) > 3
    edges = [edge for one in found.segments for edge in (one.start, one.end)]
    assert edges == sorted(edges)
    assert all(one.end > one.start for one in found.segments)
    starts = [word.start for word in found.words]
    assert starts == sorted(starts)
    assert all(0 <= word.start <= word.end <= found.duration for word in found.words)
    assert "".join(word.word for word in found.words) == "".join(found.text.split())


def test_stream(client: OpenAI, clips: dict[str, Clip]) -> None:
    """Several deltas come one after the other; joined, and in the last event, they are the text of the plain answer."""
    create = client.audio.transcriptions.create
    whole = create(file=clips["instruct"].path, model="whisper-1").text
    events = list(create(file=clips["instruct"].path, model="whisper-1", stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == whole
    last = events[-1]
    assert last.type == "transcript.text.done"
    assert last.text == whole


def test_a_hint_that_the_model_lacks(client: OpenAI, clips: dict[str, Clip]) -> None:
    """An English model ignores the German hint with a warning; without the English hint it refuses the request."""
    create = client.audio.transcriptions.with_raw_response.create
    audio = clips["monkeys"].path
    found = create(file=audio, model="whisper-1", extra_body={"languages": ["de", "en-US"], "seed": 1})
    assert "monkeys" in found.parse().text
    warning = found.headers["x-whisperd-warning"]
    assert "'seed'" in warning
    assert "does not know the language 'de'" in warning
    with pytest.raises(openai.BadRequestError, match="does not speak 'de'"):
        create(file=audio, model="whisper-1", extra_body={"languages": ["de"]})


def test_a_full_queue(daemon: DaemonProcess, client: OpenAI, clips: dict[str, Clip]) -> None:
    """While an upload holds the only place, others get the time after which to retry, and status is answered."""
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        "Content-Length: 100000000\r\n\r\n"
    )
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(daemon.socket_path))
        slow.sendall(head.encode())
        until(lambda: daemon.client.status()["requests"]["active"])
        with pytest.raises(openai.RateLimitError) as caught:
            client.audio.transcriptions.create(file=clips["monkeys"].path, model="whisper-1")
        assert caught.value.code == "queue_full"
        assert float(caught.value.response.headers["retry-after-ms"]) > 0
        assert daemon.client.ready()
    until(lambda: not daemon.client.status()["requests"]["active"])
    assert plain(client.audio.transcriptions.create(file=clips["monkeys"].path, model="whisper-1").text)


def test_no_transcript_in_any_log(daemon: DaemonProcess, client: OpenAI, clips: dict[str, Clip]) -> None:
    """At the most detailed level, no word of a recording, of a prompt or of a hot word is in the log."""
    create = client.audio.transcriptions.create
    audio = ("talk.wav", clips["monkeys"].path.read_bytes())
    hints = {"hotwords": HOTWORD, "keywords": [HOTWORD]}
    answers = [
        str(create(file=audio, model="whisper-1", response_format=kind, prompt=PROMPT, extra_body=hints))
        for kind in ("json", "text", "srt", "vtt", "verbose_json")
    ]
    assert all("monkeys" in answer for answer in answers)
    assert list(create(file=audio, model="whisper-1", stream=True, include=["logprobs"], prompt=PROMPT))
    with pytest.raises(openai.BadRequestError):
        create(file=(f"{HOTWORD}.wav", b"no audio"), model="whisper-1", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError):
        create(file=audio, model="whisper-1", language=PROMPT)

    async def speak() -> str:
        path = daemon.directory / "wyoming"
        async with AsyncUnixClient(path, connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S) as speaker:
            asked = Transcribe(language="en", transcript_names=[HOTWORD])
            return (await transcribed(speaker, pcm(clips["monkeys"].samples()), asked)).text

    assert "monkeys" in asyncio.run(speak())
    assert daemon.client.ready()  # which is logged at that level only
    log = daemon.log
    assert "DEBUG" in log
    assert log.count(f"POST {URL} ") >= 7
    words = {*re.findall(r"[a-z]{5,}", plain(clips["monkeys"].text)), PROMPT, HOTWORD}
    assert "monkeys" in words
    assert [word for word in words if re.search(rf"\b{word}\b", log, re.IGNORECASE)] == []
