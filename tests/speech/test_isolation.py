"""A file that crashes its decoder, hangs it or fills its memory is refused, and other requests are not affected."""

from __future__ import annotations

import io
import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.speech import Clip, noise, wav
from whisperd.errors import AudioError, AudioTooLong, RequestError
from whisperd.speech import audio
from whisperd.speech.audio import AudioRequest
from whisperd.speech.isolation import IsolatedDecoder
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

MEBIBYTE = 1 << 20
INDEX_SAMPLES = 85_000_000


@pytest.fixture(scope="module")
def decoder() -> Iterator[IsolatedDecoder]:
    found = IsolatedDecoder(os.environ)
    found.start()
    yield found
    found.close()


def read(decoder: IsolatedDecoder, data: bytes, request: AudioRequest | None = None) -> Samples:
    with decoder.open(io.BytesIO(data), request or AudioRequest(name="talk.mp3")) as recording:
        return np.concatenate(list(recording.blocks()))


def children(pid: int) -> set[int]:
    """The running processes that a process has forked."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return set(map(int, text.split()))


def server_of(decoder: IsolatedDecoder) -> int:
    assert decoder.pid is not None
    return decoder.pid


def until(happened: object, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    assert callable(happened)
    while not happened():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def test_same_samples(decoder: IsolatedDecoder, clips: dict[str, Clip]) -> None:
    """Samples from the other process equal those of decoding here, for files on disk and in memory."""
    expected = clips["agent"].samples()
    with clips["agent"].path.open("rb") as file, decoder.open(file, AudioRequest()) as recording:
        assert recording.length_s == pytest.approx(3.285, abs=0.01)
        assert np.array_equal(np.concatenate(list(recording.blocks())), expected)
        assert recording.warnings == ()
    assert np.array_equal(read(decoder, clips["agent"].path.read_bytes()), expected)


def test_warnings(decoder: IsolatedDecoder) -> None:
    """A warning about missing audio comes after the last block."""
    data = wav(noise(20.0)).getvalue()
    with decoder.open(io.BytesIO(data[: len(data) // 2]), AudioRequest()) as recording:
        assert sum(map(len, recording.blocks())) < 11 * SAMPLE_RATE_HZ
        assert "ends at 10.0 s, but the file claims 20.0 s" in recording.warnings[0]


@pytest.mark.parametrize(
    ("data", "request_", "error", "message"),
    [
        (b"", AudioRequest(name="talk.mp3"), AudioError, "'talk.mp3' is empty"),
        (b"no audio" * 100, AudioRequest(name="talk.mp3"), AudioError, "'talk.mp3' is not audio"),
        (wav(noise(20.0)).getvalue(), AudioRequest(max_s=10.0), AudioTooLong, "limit of 10 s"),
        (wav(noise(1.0)).getvalue(), AudioRequest(track=3), RequestError, "no audio track 3"),
    ],
)
def test_errors(
    decoder: IsolatedDecoder, data: bytes, request_: AudioRequest, error: type[Exception], message: str
) -> None:
    """Errors keep their class and their message between processes."""
    with pytest.raises(error, match=message):
        read(decoder, data, request_)


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def mp4_with_huge_index() -> bytes:
    """Some hundred bytes of MP4 whose tables claim INDEX_SAMPLES packets."""
    entry = box(b"mp4a", bytes(6), struct.pack(">HHHIHHHHI", 1, 0, 0, 0, 2, 16, 0, 0, 44_100 << 16))
    tables = box(
        b"stbl",
        box(b"stsd", bytes(4), struct.pack(">I", 1), entry),
        box(b"stts", bytes(4), struct.pack(">III", 1, INDEX_SAMPLES, 1024)),
        box(b"stsc", bytes(4), struct.pack(">IIII", 1, 1, INDEX_SAMPLES, 1)),
        box(b"stsz", bytes(4), struct.pack(">II", 4, INDEX_SAMPLES)),
        box(b"stco", bytes(4), struct.pack(">II", 1, 48)),
    )
    media = box(
        b"mdia",
        box(b"mdhd", bytes(12), struct.pack(">IIHH", 44_100, 1024, 0, 0)),
        box(b"hdlr", bytes(8), b"soun", bytes(13)),
        box(b"minf", box(b"smhd", bytes(8)), tables),
    )
    track = box(b"trak", box(b"tkhd", bytes(12), struct.pack(">I", 1), bytes(68)), media)
    movie = box(b"moov", box(b"mvhd", bytes(12), struct.pack(">II", 1000, 1000), bytes(80)), track)
    return box(b"ftyp", b"M4A ", bytes(4)) + box(b"mdat", bytes(100)) + movie


def flac_of_1_hz() -> bytes:
    """A FLAC header that says 1 Hz, with one frame that claims thirty thousand samples: eight hours."""
    info = (
        struct.pack(">HH", 30_000, 30_000) + bytes(6) + struct.pack(">Q", (1 << 44) | (15 << 36) | 30_000) + bytes(16)
    )
    return b"fLaC\x80\x00\x00\x22" + info + bytes.fromhex("fff87008007530000000") + bytes(8)


@pytest.mark.parametrize("bomb", [mp4_with_huge_index(), flac_of_1_hz()], ids=["index", "rate"])
def test_bombs(decoder: IsolatedDecoder, bomb: bytes) -> None:
    """A few bytes that claim gigabytes are refused at once, and this process stays as small as it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.monotonic()
    with pytest.raises(AudioError, match=r"talk\.mp3"):
        read(decoder, bomb)
    assert time.monotonic() - started_s < 20.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_memory_limit(clips: dict[str, Clip]) -> None:
    """A file that exceeds the memory limit is refused with the limit; the next one is decoded by the same server."""
    tight = IsolatedDecoder(os.environ, memory_bytes=MEBIBYTE)
    try:
        with pytest.raises(AudioError, match="more than 1 MiB of memory"):
            read(tight, wav(noise(60.0), rate_hz=96_000).getvalue())
        server = server_of(tight)
        with pytest.raises(AudioError):
            read(tight, b"no audio")
        assert server_of(tight) == server
    finally:
        tight.close()
    assert clips


def test_cpu_limit() -> None:
    """The kernel ends the decoder of a file that exceeds the CPU time for its length, and the file is refused."""
    hasty = IsolatedDecoder(os.environ, cpu_s=0)
    try:
        with pytest.raises(AudioError, match="more CPU time"):
            read(hasty, b"\xff\xfb\x90\x00" * 5_000_000)
    finally:
        hasty.close()


def test_crash(decoder: IsolatedDecoder) -> None:
    """A file that crashes native code each time is refused; files beside it are decoded."""
    server = server_of(decoder)
    with decoder.open(wav(noise(30.0)), AudioRequest()) as good:
        others = good.blocks()
        next(others)
        bystanders = children(server)

        def crash_each() -> None:
            with decoder.open(wav(noise(600.0)), AudioRequest(name="bad.mp3")) as bad:
                for _ in bad.blocks():
                    for victim in children(server) - bystanders:
                        os.kill(victim, signal.SIGSEGV)

        with pytest.raises(AudioError, match=r"'bad.mp3' cannot be decoded: the process that decoded it"):
            crash_each()
        assert sum(map(len, others)) == 20 * SAMPLE_RATE_HZ


@pytest.mark.parametrize("victim", ["process", "server"])
def test_killed(decoder: IsolatedDecoder, victim: str) -> None:
    """When a decoder or the server is killed, the file is decoded again and no sample is lost or doubled."""
    samples = noise(600.0)
    with decoder.open(wav(samples), AudioRequest()) as recording:
        blocks = recording.blocks()
        first = [next(blocks), next(blocks)]
        server = server_of(decoder)
        os.kill(server if victim == "server" else min(children(server)), signal.SIGKILL)
        found = np.concatenate([*first, *blocks])
    assert np.array_equal(found, np.concatenate(list(audio.blocks(wav(samples)))))


def test_abandoned(decoder: IsolatedDecoder) -> None:
    """When the reader stops, the process ends, and none remains."""
    with decoder.open(wav(noise(600.0)), AudioRequest()) as recording:
        next(iter(recording.blocks()))
        assert children(server_of(decoder))
    until(lambda: not children(server_of(decoder)))


def test_many_at_once(decoder: IsolatedDecoder, clips: dict[str, Clip]) -> None:
    """Concurrent requests get the samples of their own files."""
    data = [wav(noise(seconds)).getvalue() for seconds in (0.5, 1.0, 2.0, 4.0)] * 4
    with ThreadPoolExecutor(16) as pool:
        lengths = list(pool.map(lambda one: len(read(decoder, one)), data))
    assert lengths == [8_000, 16_000, 32_000, 64_000] * 4
    assert clips


def test_close_ends_the_server() -> None:
    """No process remains."""
    brief = IsolatedDecoder(os.environ)
    read(brief, wav(noise(1.0)).getvalue())
    server = server_of(brief)
    brief.close()
    assert not Path(f"/proc/{server}").exists()
