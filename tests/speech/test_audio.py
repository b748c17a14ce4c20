"""Any container is decoded to mono samples at 16 kHz, as a stream; a file that is no audio is reported as such."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, cast

import av
import numpy as np
import pytest

from tests.support.speech import Clip, noise, wav
from whisperd.errors import AudioError, AudioTooLong
from whisperd.speech import audio
from whisperd.speech.audio import AudioRequest, InProcessDecoder
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

CONTAINERS = [  # container, codec, rate, sample format
    ("wav", "pcm_s16le", 44_100, "s16"),
    ("flac", "flac", 48_000, "s16"),
    ("mp3", "libmp3lame", 44_100, "fltp"),
    ("mp4", "aac", 44_100, "fltp"),
    ("ogg", "libopus", 48_000, "flt"),
    ("webm", "libopus", 48_000, "flt"),
    ("matroska", "flac", 16_000, "s16"),
]


def encoded(samples: Samples, container: str, codec: str, rate_hz: int, sample_format: str) -> io.BytesIO:
    """Samples written by ffmpeg's own muxer; video containers get a video stream too."""
    file = io.BytesIO()
    file.name = f"x.{container}"
    with av.open(file, "w", format=container) as output:
        video = output.add_stream("mpeg4", rate=1) if container in {"mp4", "matroska"} else None
        stream = output.add_stream(codec, rate=rate_hz, layout="mono")
        resampler = av.AudioResampler(format=sample_format, layout="mono", rate=rate_hz)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        fifo = av.AudioFifo()
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            part.pts = None
            fifo.write(part)
        if video is not None:
            video.width = video.height = 64
            picture = av.VideoFrame(64, 64, "yuv420p")
            picture.pts, picture.time_base = 0, Fraction(1, 1)
            output.mux([*video.encode(picture), *video.encode(None)])
        size = getattr(stream.codec_context, "frame_size", 0) or 1024
        assert isinstance(stream, av.AudioStream)
        while (chunk := fifo.read(size, partial=True)) is not None:
            output.mux(stream.encode(chunk))
        output.mux(stream.encode(None))
    file.seek(0)
    return file


@contextmanager
def on_disk(data: bytes) -> Iterator[BinaryIO]:
    """A file without a name, as uploads are."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield cast("BinaryIO", file)


def read(file: io.BytesIO) -> Samples:
    """The samples are the same from memory and from disk, which ffmpeg reads differently."""
    found = np.concatenate(list(audio.blocks(file)))
    with on_disk(file.getvalue()) as other:
        assert np.array_equal(np.concatenate(list(audio.blocks(other))), found)
    return found


@pytest.mark.parametrize(("container", "codec", "rate_hz", "sample_format"), CONTAINERS)
def test_containers(container: str, codec: str, rate_hz: int, sample_format: str, clips: dict[str, Clip]) -> None:
    """Every container and codec gives the same sound at the same length, beside a video stream too."""
    original = clips["agent"].samples()
    found = read(encoded(original, container, codec, rate_hz, sample_format))
    assert abs(len(found) - len(original)) < 0.1 * SAMPLE_RATE_HZ
    shared = min(len(found), len(original))
    spectrum, other = (np.abs(np.fft.rfft(part[:shared]))[: shared // 4] for part in (found, original))
    assert np.corrcoef(spectrum, other)[0, 1] > 0.95


def test_samples_are_exact() -> None:
    """A 16 kHz wav is decoded unchanged, in blocks of bounded size."""
    original = noise(25.3)
    blocks = list(audio.blocks(wav(original)))
    assert [len(block) for block in blocks[:-1]] == [audio.BLOCK_SAMPLES] * 2
    joined = np.concatenate(blocks)
    assert joined.dtype == np.float32
    assert len(joined) == len(original)
    assert np.abs(joined - original).max() < 1e-4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"Dear diary, today I wrote a text file and called it talk.mp3.\n" * 50, "is not audio"),
        (b"\x00" * 5000, "is not audio"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "is not audio"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is not audio"),
        (b"RIFF\x24\x00\x00\x00WAVE", "talk.mp3"),
    ],
)
def test_not_audio(data: bytes, message: str) -> None:
    """A file that cannot be decoded is an AudioError that names the file, and playlists open nothing."""
    with on_disk(data) as file:
        for source in (io.BytesIO(data), file):
            with pytest.raises(AudioError, match=message) as caught:
                list(audio.blocks(source, name="talk.mp3"))
            assert "talk.mp3" in str(caught.value)
            assert "Errno" not in str(caught.value)


def test_video_without_sound(tmp_path: Path) -> None:
    """A video without an audio stream is reported as such."""
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as output:
        video = output.add_stream("mpeg4", rate=1)
        video.width = video.height = 64
        picture = av.VideoFrame(64, 64, "yuv420p")
        output.mux([*video.encode(picture), *video.encode(None)])
    with path.open("rb") as file, pytest.raises(AudioError, match="no audio stream"):
        list(audio.blocks(file))


def test_cut_off(clips: dict[str, Clip]) -> None:
    """A file that ends too early gives the samples that it has."""
    whole = clips["instruct"].path.read_bytes()
    half = read(io.BytesIO(whole[: len(whole) // 2]))
    assert 20 * SAMPLE_RATE_HZ < len(half) < 60 * SAMPLE_RATE_HZ


def test_damaged_middle(clips: dict[str, Clip]) -> None:
    """A damaged stretch loses its own packets and not the rest."""
    for container, codec, sample_format in (("mp3", "libmp3lame", "fltp"), ("flac", "flac", "s16")):
        damaged = bytearray(encoded(clips["instruct"].samples(), container, codec, 44_100, sample_format).getvalue())
        middle = len(damaged) // 2
        damaged[middle : middle + 2000] = bytes(2000)
        assert len(read(io.BytesIO(bytes(damaged)))) > 70 * SAMPLE_RATE_HZ


def test_the_first_of_several_streams(clips: dict[str, Clip]) -> None:
    """Of two audio streams the first one is read, although the second has more channels."""
    loud = (clips["agent"].samples() * 32767).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        streams = [output.add_stream("flac", rate=SAMPLE_RATE_HZ, layout=layout) for layout in ("mono", "stereo")]
        for stream, samples in zip(streams, (loud[None], np.zeros((1, 2 * len(loud)), np.int16)), strict=True):
            assert isinstance(stream, av.AudioStream)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=stream.layout.name)
            frame.sample_rate = SAMPLE_RATE_HZ
            fifo = av.AudioFifo()
            fifo.write(frame)
            at = 0
            while (chunk := fifo.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
                chunk.pts, chunk.time_base = at, Fraction(1, SAMPLE_RATE_HZ)
                at += chunk.samples
                output.mux(stream.encode(chunk))
            output.mux(stream.encode(None))
    file.seek(0)
    assert np.abs(read(file)).max() > 0.1


def test_too_long() -> None:
    """Audio over the limit is refused with the limit and the option that sets it."""
    with pytest.raises(AudioTooLong, match=r"10 s \(limits\.audio_s\)"):
        list(audio.blocks(wav(noise(20.0)), max_s=10.0))


def test_length(clips: dict[str, Clip]) -> None:
    """The length is known before decoding where the header states it."""
    with clips["agent"].path.open("rb") as file, InProcessDecoder().open(file, AudioRequest()) as recording:
        assert recording.length_s == pytest.approx(3.285, abs=0.01)


def float_wav(samples: Samples) -> io.BytesIO:
    """float32 [n] as a wav file of floats, whatever they are."""
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, SAMPLE_RATE_HZ, 4 * SAMPLE_RATE_HZ, 4, 32)
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return io.BytesIO(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf, 3e38])
def test_wild_samples(wild: float) -> None:
    """An invalid sample changes no other sample."""
    samples = noise(3.0)
    samples[20_000] = wild
    found = read(float_wav(samples))
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.0
    assert np.allclose(np.delete(found, 20_000), np.delete(samples, 20_000), atol=1e-6)


def test_integers_as_floats(clips: dict[str, Clip]) -> None:
    """A file of floats that holds integers is scaled as integers."""
    samples = clips["agent"].samples()
    found = read(float_wav(np.round(samples * 32_767)))
    assert np.abs(found).max() <= 1.0
    assert np.corrcoef(found, samples)[0, 1] > 0.999


def test_floats_that_are_no_sound() -> None:
    """A file of floats outside any scale is refused with a message."""
    with pytest.raises(AudioError, match="no sound in any scale"):
        read(float_wav(noise(1.0) * 1e30))


def test_header_of_a_pipe() -> None:
    """A wav file whose size was not known when its header was written is read whole."""
    data = bytearray(wav(noise(2.0)).getvalue())
    data[40:44] = b"\xff\xff\xff\xff"
    with InProcessDecoder().open(io.BytesIO(data), AudioRequest()) as recording:
        assert sum(map(len, recording.blocks())) == 2 * SAMPLE_RATE_HZ
        assert recording.warnings == ()
