"""The same speech in several forms and lengths, made from the sample recording that whisperd ships."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from whisperd.speech import audio
from whisperd.speech.units import SAMPLE_RATE_HZ

SAMPLE = Path(str(resources.files("whisperd").joinpath("data/sample.opus")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A container, codec and sample rate."""

    suffix: str
    codec: str
    rate_hz: int
    sample_format: str
    layout: str
    bits_per_s: int = 0


FORMS = {
    "mp3": Form(
        suffix="mp3", codec="libmp3lame", rate_hz=44_100, sample_format="s16p", layout="stereo", bits_per_s=128_000
    ),
    "aac": Form(suffix="mp4", codec="aac", rate_hz=44_100, sample_format="fltp", layout="stereo", bits_per_s=128_000),
    "opus": Form(suffix="ogg", codec="libopus", rate_hz=48_000, sample_format="s16", layout="mono", bits_per_s=32_000),
    "flac": Form(suffix="flac", codec="flac", rate_hz=44_100, sample_format="s16", layout="stereo"),
    "wav": Form(suffix="wav", codec="pcm_s16le", rate_hz=44_100, sample_format="s16", layout="stereo"),
    "PCM": Form(suffix="wav", codec="pcm_s16le", rate_hz=SAMPLE_RATE_HZ, sample_format="s16", layout="mono"),
}


def recordings(directory: Path, duration_s: float, forms: Sequence[str]) -> Iterator[tuple[str, Path, float]]:
    """Writes the repeated sample in each form; yields the form, the file and its length."""
    samples = speech(duration_s)
    for name in forms:
        path = directory / f"{name}.{FORMS[name].suffix}"
        write(path, samples, FORMS[name])
        yield name, path, len(samples) / SAMPLE_RATE_HZ


def speech(duration_s: float) -> NDArray[np.float32]:
    """float32 [n] at 16 kHz."""
    with SAMPLE.open("rb") as file:
        samples = np.concatenate(list(audio.blocks(file)))
    return np.resize(samples, round(duration_s * SAMPLE_RATE_HZ))


def write(path: Path, samples: NDArray[np.float32], form: Form) -> None:
    """Writes samples at 16 kHz in a form, second by second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(form.codec, rate=form.rate_hz, layout=form.layout)
        if form.bits_per_s:
            stream.bit_rate = form.bits_per_s
        resampler = av.AudioResampler(format=form.sample_format, layout=form.layout, rate=form.rate_hz)
        for at in range(0, len(samples), SAMPLE_RATE_HZ):
            second = np.ascontiguousarray(samples[None, at : at + SAMPLE_RATE_HZ])
            frame = av.AudioFrame.from_ndarray(second, format="flt", layout="mono")
            frame.sample_rate = SAMPLE_RATE_HZ
            _mux(container, stream, resampler.resample(frame))
        _mux(container, stream, [*resampler.resample(None), None])


def _mux(container: Any, stream: Any, frames: Sequence[av.AudioFrame | None]) -> None:
    for frame in frames:
        if frame is not None:
            frame.pts = None
        container.mux(stream.encode(frame))
