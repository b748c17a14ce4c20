"""The voice detector hears speech and nothing else, in pieces as well as at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.speech import Clip, Samples, noise, silence
from whisperd.vad import SpeechDetector


def probabilities(detector: SpeechDetector, samples: Samples, sizes: list[int] | None = None) -> Samples:
    stream = detector.stream()
    parts, rest = [], samples
    for size in sizes or []:
        parts.append(stream.feed(rest[:size]))
        rest = rest[size:]
    return np.concatenate([*parts, stream.feed(rest), stream.finish()])


def test_speech_and_silence(detector: SpeechDetector, clips: dict[str, Clip]) -> None:
    """Speech is sure, silence and noise are not speech."""
    assert np.median(probabilities(detector, clips["monkeys"].samples())) > 0.8
    assert probabilities(detector, silence(3.0)).max() < 0.3
    assert probabilities(detector, noise(3.0)).max() < 0.5


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 20_000), max_size=6))
def test_pieces(detector: SpeechDetector, clips: dict[str, Clip], sizes: list[int]) -> None:
    """However the audio is cut up, the probabilities are the same, one for each begun frame."""
    samples = clips["agent"].samples()
    whole = probabilities(detector, samples)
    assert len(whole) == -(-len(samples) // 512)
    assert np.allclose(probabilities(detector, samples, sizes), whole, atol=1e-5)


def test_nothing(detector: SpeechDetector) -> None:
    """No audio gives no frames."""
    assert len(probabilities(detector, silence(0.0))) == 0
