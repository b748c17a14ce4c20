"""Files joined from parts of any format are decoded to their end, as by ffmpeg's command line."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whisperd.speech import audio
from whisperd.speech.audio import AudioRequest, InProcessDecoder
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

FFMPEG = shutil.which("ffmpeg") or ""
pytestmark = pytest.mark.skipif(not FFMPEG, reason="ffmpeg is not installed")

TONE_HZ = 440
PART_S = 2.0
TONE_FROM_S, TONE_TO_S = 0.75, 1.25
STEP = 800  # 50 ms
TOLERANCE_S = 0.05


@dataclass(frozen=True)
class Form:
    suffix: str
    arguments: tuple[str, ...]
    rates_hz: tuple[int, ...]
    channels: tuple[int, ...] = (1, 2)


BY_BYTES = (  # formats that may be joined byte by byte
    Form(".mp3", ("-c:a", "libmp3lame"), (16_000, 22_050, 44_100, 48_000)),
    Form(".aac", ("-c:a", "aac"), (16_000, 44_100, 48_000), (1, 2, 6)),
    Form(".ac3", ("-c:a", "ac3"), (32_000, 44_100, 48_000), (1, 2, 6)),
    Form(".eac3", ("-c:a", "eac3"), (32_000, 48_000), (1, 2, 6)),
    Form(".mp2", ("-c:a", "mp2"), (22_050, 44_100, 48_000)),
    Form(".aac.ts", ("-c:a", "aac", "-f", "mpegts"), (16_000, 44_100, 48_000), (1, 2, 6)),
    Form(".mp2.ts", ("-c:a", "mp2", "-f", "mpegts"), (32_000, 48_000)),
    Form(".ac3.ts", ("-c:a", "ac3", "-f", "mpegts"), (32_000, 48_000), (1, 2, 6)),
    Form(".opus.ogg", ("-c:a", "libopus"), (48_000,)),
)
BY_CONCAT = tuple(form for form in BY_BYTES if form.suffix in {".mp3", ".ac3", ".eac3", ".mp2"})


def run(*arguments: str) -> bytes:
    return subprocess.run([FFMPEG, "-nostdin", "-v", "error", "-y", *arguments], check=True, capture_output=True).stdout


def part(directory: Path, form: Form, rate_hz: int, channels: int) -> Path:
    """Two seconds of silence with half a second of tone in the middle; made once."""
    path = directory / f"{rate_hz}-{channels}{form.suffix}"
    if not path.exists():
        loud = f"between(t,{TONE_FROM_S},{TONE_TO_S})"
        source = f"sine=f={TONE_HZ}:d={PART_S}:r={rate_hz},volume='if({loud},4,0)':eval=frame"
        run("-f", "lavfi", "-i", source, "-ac", str(channels), *form.arguments, str(path))
    return path


def tones_s(samples: Samples) -> list[float]:
    """The times at which tones begin."""
    windows = samples[: len(samples) // STEP * STEP].reshape(-1, STEP)
    wave = np.exp(-2j * np.pi * TONE_HZ * np.arange(STEP) / SAMPLE_RATE_HZ)
    heard = np.concatenate([[False], np.abs(windows @ wave) / STEP > 0.02])
    starts = np.flatnonzero(heard[1:] & ~heard[:-1]) * STEP / SAMPLE_RATE_HZ
    return [float(start) for start, before in zip(starts, [-1.0, *starts], strict=False) if start - before > 0.3]


def read(path: Path) -> Samples:
    with path.open("rb") as file:
        return np.concatenate(list(audio.blocks(file)))


def ffmpeg_s(path: Path) -> float:
    arguments = ("-map", "0:a:0", "-f", "s16le", "-ac", "1", "-ar", str(SAMPLE_RATE_HZ), "-")
    return len(run("-v", "quiet", "-i", str(path), *arguments)) / 2 / SAMPLE_RATE_HZ


def check(path: Path, n_parts: int) -> None:
    samples = read(path)
    assert len(samples) / SAMPLE_RATE_HZ == pytest.approx(ffmpeg_s(path), abs=TOLERANCE_S)
    found_s = tones_s(samples)
    assert len(found_s) == n_parts
    padding_s = 0.15 * n_parts  # what encoders put before and behind each part
    for index, start_s in enumerate(found_s):
        assert index * PART_S + TONE_FROM_S - 0.1 <= start_s <= index * PART_S + TONE_FROM_S + padding_s


@st.composite
def sequences(draw: st.DrawFn, forms: tuple[Form, ...]) -> tuple[Form, list[tuple[int, int]]]:
    form = draw(st.sampled_from(forms))
    shapes = st.tuples(st.sampled_from(form.rates_hz), st.sampled_from(form.channels))
    return form, draw(st.lists(shapes, min_size=2, max_size=4))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences(BY_BYTES))
def test_joined_by_bytes(directory: Path, drawn: tuple[Form, list[tuple[int, int]]]) -> None:
    """In files joined byte by byte with changing rate and channels, every part is decoded, at its time."""
    form, shapes = drawn
    path = directory / f"joined{form.suffix}"
    path.write_bytes(b"".join(part(directory, form, *shape).read_bytes() for shape in shapes))
    check(path, len(shapes))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences(BY_CONCAT), st.sampled_from([".mkv", ".ts"]))
def test_joined_by_concat(directory: Path, drawn: tuple[Form, list[tuple[int, int]]], container: str) -> None:
    """The same files joined in one container by ffmpeg's concat are decoded."""
    form, shapes = drawn
    listed = directory / "list.txt"
    parts = [part(directory, form, *shape) for shape in shapes]
    listed.write_text("".join(f"file '{one}'\n" for one in parts), encoding="utf-8")
    path = directory / f"joined{container}"
    run("-f", "concat", "-safe", "0", "-i", str(listed), "-map", "0:a", "-c", "copy", str(path))
    check(path, len(shapes))


@pytest.mark.parametrize(
    ("suffix", "arguments"),
    [
        (".spx.ogg", ("-c:a", "libspeex", "-ar", "16000", "-ac", "1")),
        (".mp2", ("-c:a", "mp2", "-ac", "1")),
        (".tta", ("-c:a", "tta", "-ac", "1")),
        (".16.tta", ("-c:a", "tta", "-ac", "16")),
        (".7.m4a", ("-c:a", "aac", "-ac", "7")),
        (".8.m4a", ("-c:a", "aac", "-ac", "8")),
        (".64.wav", ("-c:a", "pcm_s64le", "-ac", "24")),
    ],
)
def test_rare_forms(tmp_path: Path, suffix: str, arguments: tuple[str, ...]) -> None:
    """Codecs and numbers of channels that few programs write are decoded."""
    path = tmp_path / f"x{suffix}"
    run("-f", "lavfi", "-i", f"sine=f={TONE_HZ}:d=2", *arguments, str(path))
    assert len(read(path)) / SAMPLE_RATE_HZ == pytest.approx(ffmpeg_s(path), abs=TOLERANCE_S)


def late(tmp_path: Path) -> Path:
    """A video of 16 s whose tone of 2 s begins at 10 s."""
    path, sound, picture = tmp_path / "late.mp4", tmp_path / "a.m4a", tmp_path / "v.mp4"
    run("-f", "lavfi", "-i", f"sine=f={TONE_HZ}:d=2,volume=4", "-c:a", "aac", str(sound))
    run("-f", "lavfi", "-i", "color=s=64x64:r=10:d=16", "-c:v", "mpeg4", str(picture))
    run("-i", str(picture), "-itsoffset", "10", "-i", str(sound), "-map", "0:v", "-map", "1:a", "-c", "copy", str(path))
    return path


def test_late_sound(tmp_path: Path) -> None:
    """Sound that begins after the picture keeps its time."""
    assert tones_s(read(late(tmp_path))) == pytest.approx([10.0], abs=0.1)


def test_hole(tmp_path: Path) -> None:
    """A gap of twenty seconds in the timestamps is kept."""
    first, second, path = (tmp_path / name for name in ("1.mka", "2.mka", "hole.mkv"))
    run("-f", "lavfi", "-i", f"sine=f={TONE_HZ}:d=1,volume=4", "-c:a", "libopus", str(first))
    run("-f", "lavfi", "-i", f"sine=f={TONE_HZ}:d=1,volume=4", "-c:a", "libopus", str(second))
    listed = tmp_path / "list.txt"
    listed.write_text(f"file '{first}'\nduration 21\nfile '{second}'\n", encoding="utf-8")
    run("-f", "concat", "-safe", "0", "-i", str(listed), "-c", "copy", str(path))
    assert tones_s(read(path)) == pytest.approx([0.0, 21.0], abs=0.15)


def test_tracks(tmp_path: Path) -> None:
    """The default track is decoded although a silent one comes before it; others are chosen by number or language."""
    path = tmp_path / "tracks.mkv"
    run(
        *("-f", "lavfi", "-i", "anullsrc=d=2", "-f", "lavfi", "-i", f"sine=f={TONE_HZ}:d=2,volume=4"),
        *("-map", "0:a", "-map", "1:a", "-c:a", "flac", "-disposition:a:0", "0", "-disposition:a:1", "default"),
        *("-metadata:s:a:0", "language=fra", "-metadata:s:a:1", "language=eng", str(path)),
    )
    for track, is_heard in {None: True, 0: False, 1: True, "en": True, "fr": False, "eng": True}.items():
        with path.open("rb") as file:
            samples = np.concatenate(list(audio.blocks(file, track=track)))
        assert bool(tones_s(samples)) == is_heard


@pytest.mark.parametrize(("suffix", "bit_rate"), [(".aac", "48k"), (".m4a", "48k"), (".ts", "48k"), (".mp3", "64k")])
def test_many_damaged_places(tmp_path: Path, suffix: str, bit_rate: str) -> None:
    """More than a hundred damaged places become silence, and the sound goes on to its end."""
    path = tmp_path / f"x{suffix}"
    run("-f", "lavfi", "-i", "anoisesrc=d=120:a=0.1:seed=1", "-b:a", bit_rate, str(path))
    data = bytearray(path.read_bytes())
    n_head = len(data) // 10
    for place in range(150):
        at = n_head + (len(data) - 2 * n_head) * place // 150
        data[at : at + 24] = bytes((at * 7 + number * 31) % 256 for number in range(24))
    path.write_bytes(data)
    with path.open("rb") as file, InProcessDecoder().open(file, AudioRequest()) as recording:
        assert sum(map(len, recording.blocks())) / SAMPLE_RATE_HZ == pytest.approx(120.0, abs=4.0)
        assert recording.warnings or suffix == ".mp3"  # which loses less than a second
