"""The log-mel spectrogram is Whisper's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.speech import noise, silence
from whisperd.speech.features import LogMel, mel_filters
from whisperd.speech.units import WINDOW_SAMPLES


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters(n_mels: int) -> None:
    """Each band has one peak, Slaney's area, and together they cover the spectrum."""
    filters = mel_filters(n_mels)
    assert filters.shape == (n_mels, 201)
    assert (filters >= 0).all()
    assert (np.diff(filters.argmax(axis=1)) >= 0).all()
    hz_per_bin = 40
    assert np.median(filters.sum(axis=1) * hz_per_bin) == pytest.approx(1.0, rel=0.05)


def test_a_tone_lands_in_its_band() -> None:
    """A tone of 1 kHz is loudest in the band around 1 kHz."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    bands = LogMel(80)(tone)[:, 50]
    centre_hz = mel_filters(80)[int(bands.argmax())].argmax() * 40
    assert abs(centre_hz - 1000) < 80


def test_shape_and_range() -> None:
    """Any length gives 3000 frames whose range is that of Whisper's scaling."""
    found = LogMel(80)(noise(3.0))
    assert found.shape == (80, 3000)
    assert found.dtype == np.float32
    assert found.max() - found.min() <= 2.0 + 1e-6  # 8 decades over 4


@given(n_samples=st.integers(1, WINDOW_SAMPLES))
def test_padding_is_silence(n_samples: int) -> None:
    """The features of short audio are those of the same audio padded with zeros to 30 s."""
    samples = noise(30.0)[:n_samples]
    padded = np.zeros(WINDOW_SAMPLES, np.float32)
    padded[:n_samples] = samples
    log_mel = LogMel(80)
    assert np.allclose(log_mel(samples), log_mel(padded), atol=1e-5)


def test_silence() -> None:
    """Silence gives the lowest value in every frame."""
    found = LogMel(80)(silence(1.0))
    assert (found.min(), found.max()) == (pytest.approx(-1.5), pytest.approx(-1.5))
