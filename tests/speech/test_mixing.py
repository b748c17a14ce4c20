"""Channels of any kind become one channel of finite numbers in [-1, 1] that holds the speech."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from whisperd.speech.mixing import RangeMeter, as_channels, channel_weights, downmix, is_plausible, within_range

STEREO = channel_weights(["FL", "FR"])
SURROUND = channel_weights(["FL", "FR", "FC", "LFE", "BL", "BR"])
TONE = np.sin(np.arange(1600, dtype=np.float32) / 5)
SILENCE = np.zeros_like(TONE)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint8), [-1.0, 0.0, 127 / 128]),
        (np.array([[-(2**15), 0, 2**14]], np.int16), [-1.0, 0.0, 0.5]),
        (np.array([[-(2**31), 0, 2**30]], np.int32), [-1.0, 0.0, 0.5]),
        (np.array([[-(2**63), 0, 2**62]], np.int64), [-1.0, 0.0, 0.5]),
        (np.array([[-2.0, 0, 0.5]], np.float64), [-2.0, 0.0, 0.5]),
    ],
)
def test_types(samples: np.ndarray, expected: list[float]) -> None:
    """Integers of every width are scaled to [-1, 1]; floats are unchanged."""
    assert as_channels(samples, 1).tolist() == [expected]


def test_interleaved_channels() -> None:
    """Interleaved and planar channels give the same result."""
    planar = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    assert np.array_equal(as_channels(planar.T.reshape(1, -1), 2), planar)
    assert np.array_equal(as_channels(planar, 2), planar)


def test_weights() -> None:
    """The centre counts most, the low-frequency channel does not; unknown layouts count alike; the sum cannot clip."""
    assert SURROUND[2] == SURROUND.max()
    assert SURROUND[3] == 0.0
    assert channel_weights(["NONE"] * 7).tolist() == pytest.approx([1 / 7] * 7)
    assert channel_weights(["LFE"]).tolist() == [1.0]
    for weights in (STEREO, SURROUND):
        assert weights.sum() == pytest.approx(1.0)


def test_opposite_phase() -> None:
    """Of stereo whose channels cancel each other out the louder one is used."""
    assert np.array_equal(downmix(np.stack([TONE, -TONE]), STEREO), TONE)
    assert np.array_equal(downmix(np.stack([TONE, -0.9 * TONE]), STEREO), TONE)


@pytest.mark.parametrize("right", [TONE, SILENCE, 0.3 * TONE])
def test_ordinary_stereo_is_mixed(right: np.ndarray) -> None:
    """Stereo becomes the mean of its channels, also when one of them is silent."""
    assert downmix(np.stack([TONE, right]), STEREO) == pytest.approx((TONE + right) / 2, abs=1e-6)


def test_the_low_frequency_channel_is_never_chosen() -> None:
    """The low-frequency channel is never chosen as the loudest, however loud it is."""
    channels = np.stack([SILENCE, SILENCE, 0.1 * TONE, TONE, SILENCE, SILENCE])
    assert downmix(channels, SURROUND) == pytest.approx(SURROUND[2] * 0.1 * TONE, abs=1e-6)


def test_silence() -> None:
    """Silence stays silence."""
    assert not downmix(np.stack([SILENCE, SILENCE]), STEREO).any()


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 50))), st.sampled_from([1.0, 2.0**15]))
def test_any_floats_become_sound(samples: np.ndarray, scale: float) -> None:
    """NaN, infinity and the largest numbers give finite samples in [-1, 1]."""
    channels = within_range(samples, scale)
    mixed = downmix(channels, channel_weights(["FL"] * len(channels)))
    assert np.isfinite(mixed).all()
    assert np.abs(mixed).max() <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("samples", "scale"),
    [
        (TONE, 1.0),
        (np.ones(100), 1.0),
        (1.5 * TONE, 2.0),
        (TONE * 2**15, 2.0**15),
        (np.round(TONE * 2**14), 2.0**14),
        (np.where(np.arange(1600) == 7, 3e38, TONE), 1.0),
        (np.where(np.arange(1600) == 7, np.nan, TONE), 1.0),
        (SILENCE, 1.0),
        (TONE * 1e30, None),
    ],
)
def test_scale_of_floats(samples: np.ndarray, scale: float | None) -> None:
    """Integers written as floats are recognised; single extreme values do not decide the scale."""
    meter = RangeMeter()
    meter.feed(samples)
    assert meter.scale == scale


def test_plausible_floats() -> None:
    """Sound within [-1, 1] passes; integers written as floats, NaN and infinity do not."""
    assert is_plausible(np.stack([TONE, SILENCE]))
    for wrong in (TONE * np.float32(32_768), np.full_like(TONE, np.nan), np.full_like(TONE, np.inf)):
        assert not is_plausible(np.stack([TONE, wrong]))
