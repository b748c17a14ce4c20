"""The Wyoming protocol: its real clients against the listener, and invalid bytes."""

from __future__ import annotations

import asyncio
import json
import logging
import wave
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient, AsyncUnixClient
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping

from tests.support.service_fake import MODEL, PATIENCE_S, TEXT, TRANSCRIPT, FakeService
from whisperd.config.options import ServerTable
from whisperd.errors import ConfigError, QueueFull, RequestError
from whisperd.metrics import WyomingMeter
from whisperd.serving.sockets import bind_unix
from whisperd.serving.spool import Spool
from whisperd.serving.tasks import Pace
from whisperd.serving.wyoming import Listener, Settings, listener, messages, require, session
from whisperd.serving.wyoming.messages import ProtocolError, read_event
from whisperd.serving.wyoming.recording import Format, parse_format, wav_header
from whisperd.serving.wyoming.request import parse_request
from whisperd.speech.fallback import Options

RATE_HZ = 16_000
SECOND = bytes(2 * RATE_HZ)
SETTINGS = Settings(audio_s=lambda: 60.0)


class Counter(WyomingMeter):
    def __init__(self) -> None:
        self.results: asyncio.Queue[str] = asyncio.Queue()

    def observe_utterance(self, result: str, latency_s: float) -> None:
        assert latency_s >= 0
        self.results.put_nowait(result)


@dataclass(slots=True, kw_only=True)
class House:
    """A listener on a fake daemon."""

    service: FakeService
    spool: Spool
    listener: Listener
    serving: asyncio.Task[None]
    meter: Counter
    path: Path

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        client = AsyncUnixClient(self.path, connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S)
        async with client:
            yield client

    async def results(self, n: int) -> list[str]:
        """The outcomes of so many utterances; by then nothing of them is left."""
        async with asyncio.timeout(PATIENCE_S):
            found = [await self.meter.results.get() for _ in range(n)]
        assert (self.spool.open_files, self.spool.used_bytes, self.service.backlog.n_requests) == (0, 0, 0)
        return found


@asynccontextmanager
async def house(directory: Path, settings: Settings = SETTINGS, *, drain_s: float = PATIENCE_S) -> AsyncIterator[House]:
    path = directory / "wyoming.sock"
    service, meter = FakeService(), Counter()
    spool = Spool(directory, upload_bytes=4_000_000, budget_bytes=8_000_000)
    made = Listener(service, spool, settings, drain_s=drain_s, meter=meter)
    serving = asyncio.create_task(made.serve([bind_unix(path, mode=0o600, group=None)]))
    try:
        yield House(service=service, spool=spool, listener=made, serving=serving, meter=meter, path=path)
    finally:
        made.stop()
        async with asyncio.timeout(PATIENCE_S):
            await serving
    assert not path.exists()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def say(client: AsyncClient, audio: bytes = SECOND, asked: Transcribe | None = None, **audio_format: int) -> None:
    """One utterance, as Home Assistant sends it."""
    found = {"rate": RATE_HZ, "width": 2, "channels": 1} | audio_format
    await client.write_event((asked or Transcribe(language="en")).event())
    await client.write_event(AudioStart(**found).event())
    for start in range(0, len(audio), 4096):
        await client.write_event(AudioChunk(audio=audio[start : start + 4096], **found).event())
    await client.write_event(AudioStop().event())


async def answers(client: AsyncClient, last: str) -> list[Event]:
    """Events up to one of this type."""
    found: list[Event] = []
    while not found or found[-1].type != last:
        event = await client.read_event()
        assert event is not None, found
        found.append(event)
    return found


def test_an_utterance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The events start, chunk, transcript and stop come; the service gets a wav file; the log line has no text."""

    async def main() -> None:
        async with house(tmp_path) as found, found.client() as client:
            asked = Transcribe(
                name=MODEL, language="en-US", transcript_names=["Kenobi"], transcript_terms=["lightsaber"]
            )
            for _ in range(2):  # a connection may be used again
                await say(client, asked=asked)
                events = await answers(client, "transcript-stop")
                kinds = [event.type for event in events]
                assert kinds == [
                    "transcript-start",
                    "transcript-chunk",
                    "transcript-chunk",
                    "transcript",
                    "transcript-stop",
                ]
                assert "".join(event.data["text"] for event in events[1:3]) == events[3].data["text"] == TEXT
                assert events[3].data["language"] == "en"
            assert await found.results(2) == ["ok", "ok"]
            job = found.service.jobs[0]
            assert (job.model, job.options.language, job.options.hotwords) == (MODEL, "en", ("Kenobi", "lightsaber"))
            assert job.bulk is None
            (tmp_path / "a.wav").write_bytes(found.service.audio[0])

    with caplog.at_level(logging.DEBUG, logger="whisperd"):
        run(main())
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels(), file.getnframes()) == (
            16_000,
            2,
            1,
            16_000,
        )
    lines = [record.getMessage() for record in caplog.records if record.name == session.__name__]
    assert len(lines) == 2
    assert all(f"32000 bytes, 1.0 s of audio, model {MODEL}, req_" in line for line in lines)
    assert not any("Kenobi" in record.getMessage() for record in caplog.records)


def test_describe_and_ping(tmp_path: Path) -> None:
    """The declared models are described, the default one first; a ping is answered even during a transcription."""

    async def main() -> None:
        async with house(tmp_path) as found, found.client() as client:
            await client.write_event(Describe().event())
            info = Info.from_event((await answers(client, "info"))[0])
            (program,) = info.asr
            assert program.supports_transcript_streaming
            assert [model.name for model in program.models] == [MODEL, "local"]
            assert program.models[0].languages == ["en"]
            assert {"en", "de", "ja"} <= set(program.models[1].languages)
            found.service.waits_first = True
            await say(client)
            await asyncio.to_thread(found.service.started.wait, PATIENCE_S)
            await client.write_event(Ping(text="x").event())
            assert (await answers(client, "pong"))[0].data["text"] == "x"
            found.service.release()
            await answers(client, "transcript-stop")

    run(main())


@pytest.mark.parametrize(
    ("asked", "audio_format", "code", "message"),
    [
        (Transcribe(name="nope"), {}, "model_not_found", "nope"),
        (Transcribe(language="klingon"), {}, "invalid_value", "klingon"),
        (Transcribe(transcript_names=[1]), {}, "invalid_value", "a list of texts"),  # type: ignore[list-item]
        (Transcribe(), {"rate": 0}, "invalid_value", "rate must be 1000 to 384000 Hz"),
        (Transcribe(), {"width": 5}, "invalid_value", "width must be 1, 2, 3 or 4 bytes"),
        (Transcribe(), {"channels": 99}, "invalid_value", "channels must be 1 to 8"),
        (Transcribe(), {"rate": 1000, "width": 1}, "audio_too_long", "limits.audio_s"),
    ],
)
def test_mistakes(tmp_path: Path, asked: Transcribe, audio_format: dict[str, int], code: str, message: str) -> None:
    """Each mistake gets an error event and a close, since some clients wait for ever after an error."""

    async def main() -> None:
        async with house(tmp_path, replace(SETTINGS, audio_s=lambda: 20.0)) as found, found.client() as client:
            await say(client, SECOND, asked, **audio_format)
            (error,) = await answers(client, "error")
            assert error.data["code"] == code
            assert message in error.data["text"]
            assert await client.read_event() is None
            assert not found.service.jobs
            assert await found.results(1) == [code]

    run(main())


NO_CHUNK = [
    [Transcribe(language="de").event(), AudioStart(rate=RATE_HZ, width=2, channels=1).event(), AudioStop().event()],
    [Transcribe(language="de").event(), AudioStop().event()],
    [AudioStart(rate=RATE_HZ, width=2, channels=1).event(), AudioStop().event()],
    [AudioStart(rate=RATE_HZ, width=2, channels=1).event(),
     AudioChunk(rate=RATE_HZ, width=2, channels=1, audio=b"").event(), AudioStop().event()],
    [AudioStop().event()],
]  # fmt: skip


@pytest.mark.parametrize("sent", NO_CHUNK)
def test_audio_stop_without_a_chunk(tmp_path: Path, sent: list[Event]) -> None:
    """An utterance without audio has an empty transcript, nothing is transcribed, and the connection goes on."""

    async def main() -> None:
        async with house(tmp_path) as found, found.client() as client:
            for event in sent:
                await client.write_event(event)
            events = await answers(client, "transcript-stop")
            assert [event.type for event in events] == ["transcript-start", "transcript", "transcript-stop"]
            transcript = Transcript.from_event(events[1])
            assert (transcript.text, transcript.language) == ("", "de" if Transcribe.is_type(sent[0].type) else None)
            assert not found.service.jobs
            await say(client)
            assert (await answers(client, "transcript"))[-1].data["text"] == TEXT
            assert await found.results(2) == ["ok", "ok"]

    run(main())


def test_silence(tmp_path: Path) -> None:
    """Silence gives the same events with an empty transcript."""

    async def main() -> None:
        async with house(tmp_path) as found, found.client() as client:
            found.service.transcript = replace(TRANSCRIPT, segments=(), language="")
            for _ in range(2):
                await say(client)
                events = await answers(client, "transcript-stop")
                assert [event.type for event in events] == ["transcript-start", "transcript", "transcript-stop"]
                assert events[1].data["text"] == ""
                assert events[1].data.get("language") is None
            assert len(found.service.jobs) == 2
            assert await found.results(2) == ["ok", "ok"]

    run(main())


def test_a_changing_format(tmp_path: Path) -> None:
    """An utterance whose format changes is a mistake."""

    async def main() -> None:
        async with house(tmp_path) as found:
            async with found.client() as client:
                for channels in (1, 2):
                    chunk = AudioChunk(rate=RATE_HZ, width=2, channels=channels, audio=SECOND)
                    await client.write_event(chunk.event())
                assert "format of the audio changes" in (await answers(client, "error"))[0].data["text"]
            assert await found.results(1) == ["invalid_value"]

    run(main())


def test_a_full_queue(tmp_path: Path) -> None:
    """A client without a place gets an error when the audio starts; one refused later gets it then."""

    async def main() -> None:
        async with house(tmp_path) as found:
            with found.service.backlog.enter(1):
                found.service.requests_max = 1
                async with found.client() as client:
                    await say(client)
                    assert (await answers(client, "error"))[0].data["code"] == "queue_full"
            found.service.error = QueueFull("too much audio")
            async with found.client() as client:
                await say(client)
                assert (await answers(client, "error"))[0].data["code"] == "queue_full"
            found.service.error = ValueError("secret detail")
            async with found.client() as client:
                await say(client)
                error = (await answers(client, "error"))[0].data
                assert error["code"] == "internal_error"
                assert "secret" not in error["text"]
            assert await found.results(3) == ["queue_full", "queue_full", "internal_error"]

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_leaves(tmp_path: Path, whole: bool) -> None:
    """The work of a client that disconnects is cancelled, or never started."""

    async def main() -> None:
        async with house(tmp_path) as found:
            found.service.waits_first = True
            async with found.client() as client:
                if whole:
                    await say(client)
                    await asyncio.to_thread(found.service.started.wait, PATIENCE_S)
                else:
                    await client.write_event(AudioChunk(rate=RATE_HZ, width=2, channels=1, audio=SECOND).event())
            assert await found.results(1) == ["cancelled"]
            assert found.service.cancelled.is_set() == whole

    run(main())


def test_home_assistant_leaves_at_the_transcript(tmp_path: Path) -> None:
    """A client that disconnects as soon as it has the transcript leaves nothing unfinished."""

    async def main() -> None:
        async with house(tmp_path) as found:
            async with found.client() as client:
                await say(client)
                await answers(client, "transcript")
            assert await found.results(1) == ["ok"]

    run(main())


@pytest.mark.parametrize(
    ("settings", "sent", "said"),
    [
        (replace(SETTINGS, idle_s=0.05), b"", b""),
        (replace(SETTINGS, event_s=0.05), b'{"type":', b"took longer than 0.05 s"),
        (replace(SETTINGS, pace=Pace(idle_s=0.05)), b'{"type": "audio-start"}\n', b"upload_stalled"),
        (
            replace(SETTINGS, pace=Pace(idle_s=0.0, bytes_per_s=1e9)),
            b'{"type": "audio-start"}\n{"type": "audio-start"}\n',
            b"upload_stalled",
        ),
    ],
)
def test_slow_clients(tmp_path: Path, settings: Settings, sent: bytes, said: bytes) -> None:
    """A client that is silent, slow, or stops in the middle gets an error and loses its place."""

    async def main() -> None:
        async with house(tmp_path, settings) as found:
            reader, writer = await asyncio.open_unix_connection(found.path)
            writer.write(sent)
            async with asyncio.timeout(PATIENCE_S):
                assert said in await reader.read()
            writer.close()
            await writer.wait_closed()
            assert found.service.backlog.n_requests == 0

    run(main())


def test_a_client_that_does_not_read(tmp_path: Path) -> None:
    """A client that does not read loses its connection and its place."""

    async def main() -> None:
        async with house(tmp_path, replace(SETTINGS, send_idle_s=0.05)) as found:
            reader, writer = await asyncio.open_unix_connection(found.path, limit=1)
            with suppress(OSError):
                while True:
                    writer.write(b'{"type": "describe"}\n')
                    await writer.drain()
            writer.transport.abort()
            del reader

    run(main())


def test_connections_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection over the limit is closed at once, and the others continue."""
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 1)

    async def main() -> None:
        async with house(tmp_path) as found, found.client() as first:
            await first.write_event(Ping().event())
            await answers(first, "pong")
            reader, writer = await asyncio.open_unix_connection(found.path)
            async with asyncio.timeout(PATIENCE_S):
                assert await reader.read() == b""
            writer.close()
            await say(first)
            await answers(first, "transcript-stop")

    run(main())


def test_a_drain(tmp_path: Path) -> None:
    """After stop an idle connection is closed, and an utterance gets its transcript."""

    async def main() -> None:
        async with house(tmp_path) as found, found.client() as busy, found.client() as idle:
            found.service.waits_first = True
            await say(busy)
            await asyncio.to_thread(found.service.started.wait, PATIENCE_S)
            found.listener.stop()
            assert await idle.read_event() is None
            found.service.release()
            await answers(busy, "transcript-stop")
            assert await busy.read_event() is None
            await found.serving

    run(main())


def test_an_utterance_that_outlives_the_drain(tmp_path: Path) -> None:
    """The client gets an error event that the daemon stops."""

    async def main() -> None:
        async with house(tmp_path, drain_s=0.0) as found, found.client() as client:
            found.service.waits_first = True
            await say(client)
            await asyncio.to_thread(found.service.started.wait, PATIENCE_S)
            found.listener.stop()
            assert (await answers(client, "error"))[0].data["code"] == "draining"
            assert found.service.cancelled.is_set()

    run(main())


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            ["describe", "ping", "transcribe", "audio-start", "audio-chunk", "audio-stop", 1, None]
        ),
        "data": st.none() | st.dictionaries(st.sampled_from(["rate", "width", "channels", "language"]), st.integers()),
        "data_length": st.integers(-2, 3_000_000) | st.none() | st.text(max_size=3) | st.floats(),
        "payload_length": st.integers(-2, 3_000_000) | st.integers(0, 40) | st.booleans(),
    },
)
LINES = HEADERS.map(lambda header: json.dumps(header).encode() + b"\n")
STREAMS = st.lists(LINES | st.binary(max_size=80) | st.just(b"{}\n") | st.just(b"[" * 3000 + b"\n"), max_size=6).map(
    b"".join
)


@given(data=STREAMS)
def test_any_bytes_are_events_or_a_protocol_error(data: bytes) -> None:
    """The reader ends with the stream or with a protocol error, and holds no more than its limits allow."""

    async def main() -> None:
        reader = asyncio.StreamReader(limit=messages.HEADER_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        with suppress(ProtocolError):
            while (event := await read_event(reader, PATIENCE_S)) is not None:
                assert isinstance(event.type, str)
                assert isinstance(event.data, dict)
                assert len(event.payload or b"") <= messages.PAYLOAD_BYTES

    asyncio.run(main())


@given(streams=st.lists(STREAMS, max_size=5))
def test_any_bytes_end_in_an_answer_or_a_close(tmp_path_factory: pytest.TempPathFactory, streams: list[bytes]) -> None:
    """The listener survives any bytes, reports mistakes in error events, and keeps nothing of them."""

    async def main() -> None:
        async with house(tmp_path_factory.mktemp("w"), replace(SETTINGS, event_s=0.2)) as found:
            for data in streams:
                reader, writer = await asyncio.open_unix_connection(found.path)
                writer.write(data)
                writer.write_eof()
                async with asyncio.timeout(PATIENCE_S):
                    said = await reader.read()
                writer.close()
                await writer.wait_closed()
                for line in said.splitlines():
                    if line.startswith(b'{"type": "error"'):
                        assert b"internal_error" not in said
            async with found.client() as client:
                await say(client)
                await answers(client, "transcript-stop")

    run(main())


def test_an_event_of_a_terabyte(tmp_path: Path) -> None:
    """The size that an event declares reserves no memory."""

    async def main() -> None:
        async with house(tmp_path) as found:
            for line, said in (
                (b'{"type": "x", "payload_length": 1099511627776}\n', b"payload_length must be"),
                (b'{"type": "x", "data_length": 1099511627776}\n', b"data_length must be"),
                (b"x" * 100_000, b"longer than 65536 bytes"),
            ):
                reader, writer = await asyncio.open_unix_connection(found.path)
                writer.write(line)
                async with asyncio.timeout(PATIENCE_S):
                    assert said in await reader.read()
                writer.close()
                await writer.wait_closed()
                assert await found.results(1) == ["protocol_error"]

    run(main())


def test_requests() -> None:
    """Languages may have a region, no language and auto mean detection, and hot words keep their rank."""
    defaults = Options(language="de", hotwords=("a",))
    assert parse_request({}, defaults).options == defaults
    assert parse_request({"language": "pt_BR"}, defaults).options.language == "pt"
    assert parse_request({"language": "auto"}, Options()).options.language is None
    words = {"transcript_terms": ["t"], "transcript_names": ["n", " "]}
    assert parse_request(words, defaults).options.hotwords == ("a", "n", "t")
    with pytest.raises(RequestError, match="name must be text"):
        parse_request({"name": 3}, defaults)
    with pytest.raises(RequestError, match="rate must be"):
        parse_format({"rate": True, "width": 2, "channels": 1})
    assert len(wav_header(Format(rate_hz=8000, width_bytes=1, channels=2), 10)) == 44


def test_addresses() -> None:
    """A port or a path; anything else is refused with examples."""
    for fine in ("127.0.0.1:10300", "0.0.0.0:10300", "[::1]:10300", "unix:/run/whisperd-wyoming.sock"):
        assert ServerTable(wyoming=fine).wyoming == fine
    for wrong in ("localhost:10300", "tcp://127.0.0.1:10300", "unix:relative", "10300"):
        with pytest.raises(ValueError, match="unix:/path"):
            ServerTable(wyoming=wrong)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the option is a mistake that says what to install, before anything listens."""
    require()
    monkeypatch.setattr("whisperd.serving.wyoming.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'whisperd\[wyoming\]'"):
        require()
