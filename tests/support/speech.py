"""Real speech as samples, and simple sounds."""

from __future__ import annotations

import io
import re
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisperd.speech import audio
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A file of speech with its reference text."""

    path: Path
    text: str

    def samples(self) -> Samples:
        """float32 [n] at 16 kHz."""
        with self.path.open("rb") as file:
            return np.concatenate(list(audio.blocks(file)))


def wav(samples: Samples, *, rate_hz: int = SAMPLE_RATE_HZ) -> io.BytesIO:
    """float32 [n] as a 16-bit mono wav file in memory."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate_hz)
        writer.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    file.seek(0)
    return file


def silence(duration_s: float) -> Samples:
    return np.zeros(round(duration_s * SAMPLE_RATE_HZ), np.float32)


def noise(duration_s: float, *, level: float = 0.05) -> Samples:
    generator = np.random.default_rng(7)
    return (generator.standard_normal(round(duration_s * SAMPLE_RATE_HZ)) * level).astype(np.float32)


def music(duration_s: float) -> Samples:
    """Chords of plucked strings with a bass and a drum, two to a second."""
    beat = np.arange(SAMPLE_RATE_HZ // 2) / SAMPLE_RATE_HZ
    drum = noise(0.5, level=0.2) * np.exp(-beat * 40)
    beats = []
    for number in range(round(duration_s * 2)):
        root_hz = 220.0 * 2 ** ((0, 5, 7, 3)[number // 4 % 4] / 12)
        voices = [root_hz / 2, *(root_hz * 2 ** (step / 12) for step in (0, 4, 7))]
        strings = sum(
            np.sin(2 * np.pi * hz * harmonic * beat) * np.exp(-beat * 3 * harmonic) / harmonic
            for hz in voices
            for harmonic in range(1, 6)
        )
        beats.append(0.08 * strings + drum * (number % 2))
    return np.concatenate(beats).astype(np.float32)


def plain(text: str) -> str:
    """The words in lower case without punctuation, for comparison."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def word_errors(expected: str, found: str) -> int:
    """The edit distance of two ``plain`` texts in words."""
    wanted, got = plain(expected).split(), plain(found).split()
    costs = list(range(len(got) + 1))
    for row, word in enumerate(wanted, 1):
        above, costs[0] = costs[0], row
        for column, other in enumerate(got, 1):
            above, costs[column] = costs[column], min(costs[column] + 1, costs[column - 1] + 1, above + (word != other))
    return costs[-1]
