"""Channels of any number, type and range to one channel of float32 in [-1, 1]. Pure.

The weights are those of ITU-R BS.775 as ffmpeg applies them, scaled so that the sum cannot clip: front left and right
-3 dB, centre 0 dB, surround -6 dB, no low-frequency channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whisperd.speech.units import Floats

CENTRE, FRONT, SURROUND = 1.0, 0.5**0.5, 0.5
WEIGHTS = {"FC": CENTRE, "FL": FRONT, "FR": FRONT, "DL": FRONT, "DR": FRONT, "LFE": 0.0, "LFE2": 0.0}
SURROUNDS = frozenset({"BL", "BR", "BC", "SL", "SR", "FLC", "FRC", "WL", "WR", "TC", "TFL", "TFC", "TFR", "TBL", "TBR"})
# A downmix this far below its loudest channel (in power: -14 dB) has cancelled itself out, as with L = -R. Real stereo
# loses at most 6 dB, and a voice in the centre of 5.1 loses 11 dB
CANCELLED_POWER = 0.04
BEYOND_RANGE = 1e-3  # the part of a float file's samples that may be clipped; with more, the file is scaled
EXPONENTS = range(-150, 129)  # of float32, subnormal numbers included
MAX_EXPONENT = 31  # of 32-bit integers: what is larger is no sound in any scale
ROUNDING = np.float32(1 - 2**-20)  # keeps samples of exactly 1.0, as clipped files have them, inside the range

Samples = NDArray[Any]


def channel_weights(names: Sequence[str]) -> Floats:
    """float32 [channels] that sums to 1; ``names`` are ffmpeg's (``FL``, ``LFE``, or anything where none is known)."""
    weights = [WEIGHTS.get(name, SURROUND if name in SURROUNDS else CENTRE) for name in names]
    total = sum(weights)
    return np.array([weight / total for weight in weights] if total else [1 / len(names)] * len(names), np.float32)


def as_channels(samples: Samples, n_channels: int) -> Floats:
    """ffmpeg's [channels, n] (planar) or [1, n * channels] (interleaved) of any type to float32 [channels, n].

    Integers are scaled to [-1, 1]; floats stay as they are.
    """
    planes = samples if len(samples) == n_channels else samples.reshape(-1, n_channels).T
    if planes.dtype == np.uint8:
        return (planes.astype(np.float32) - np.float32(128)) / np.float32(128)
    found = np.ascontiguousarray(planes, np.float32)
    return found * np.float32(-1 / float(np.iinfo(planes.dtype).min)) if planes.dtype.kind == "i" else found


def is_plausible(channels: Floats) -> bool:
    """False for float32 [channels, n] that must be brought within range: no sound in [-1, 1] has so much power."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(float(channel @ channel) <= len(channel) for channel in channels)  # false for NaN, too


def within_range(samples: Floats, scale: float = 1.0) -> Floats:
    """Floats of any origin to finite numbers in [-1, 1]: NaN and infinity become silence, the rest is clipped."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = samples * np.float32(1 / scale)
        if not np.isfinite(scaled).all():
            scaled = np.where(np.isfinite(scaled), scaled, np.float32(0.0))
    clipped: Floats = np.clip(scaled, -1.0, 1.0)
    return clipped


def downmix(channels: Floats, weights: Floats) -> Floats:
    """float32 [channels, n] in [-1, 1] to [n]: the weighted sum, or the loudest channel where the sum cancels out."""
    if len(channels) == 1:
        first: Floats = channels[0]
        return first
    mixed: Floats = weights @ channels
    powers = np.array([float(channel @ channel) for channel in channels]) * (weights > 0)
    loudest = int(powers.argmax())
    is_cancelled = float(mixed @ mixed) < CANCELLED_POWER * float(powers[loudest])
    chosen: Floats = channels[loudest] if is_cancelled else mixed
    return chosen


class RangeMeter:
    """Finds the scale of float samples: some programs write integers as floats, so that 1.0 is one part in 32,768."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(EXPONENTS), np.int64)

    def feed(self, samples: Samples) -> None:
        """Takes floats of any shape; what is not finite, and zero, says nothing about the scale."""
        with np.errstate(over="ignore"):
            flat = samples.astype(np.float32).reshape(-1)
        _, exponents = np.frexp(flat[np.isfinite(flat) & (flat != 0)] * ROUNDING)
        self._counts += np.bincount(exponents - EXPONENTS.start, minlength=len(EXPONENTS))

    @property
    def scale(self) -> float | None:
        """The power of two that brings all but BEYOND_RANGE of the samples into [-1, 1]; None: it is no sound."""
        above = np.cumsum(self._counts[::-1])[::-1]  # samples with this exponent or a larger one
        allowed = BEYOND_RANGE * max(1, int(above[0]))
        exponent = next((e for e, n in zip(EXPONENTS, [*above[1:], 0], strict=True) if e >= 0 and n <= allowed), 0)
        return float(2**exponent) if exponent <= MAX_EXPONENT else None
