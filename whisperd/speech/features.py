"""Samples to Whisper's log-mel spectrogram.

The recipe is openai-whisper's ``audio.py``: 25 ms Hann windows every 10 ms, Slaney mel bands, log10, a dynamic range
of 8, scaled around 1. The audio is padded with silence to 30 s, not the features with zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whisperd.speech.units import SAMPLE_RATE_HZ, WINDOW_SAMPLES, Floats

N_FFT = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms per mel frame
CHUNK_FRAMES = WINDOW_SAMPLES // HOP_SAMPLES
FLOOR_POWER = 1e-10
DYNAMIC_RANGE_LOG10 = 8.0
PRODUCT_FRAMES = 8  # a larger product wakes the threads of numpy's BLAS, which then spin for a while


class LogMel:
    """The features of one model: ``n_mels`` is 80, or 128 from large-v3 on. Safe to share among threads."""

    def __init__(self, n_mels: int) -> None:
        self._filters = mel_filters(n_mels)
        self._hann = np.hanning(N_FFT + 1)[:-1].astype(np.float32)

    def __call__(self, samples: Floats) -> Floats:
        """float32 [n], n <= 480000, to float32 [n_mels, 3000]."""
        n_live = min(CHUNK_FRAMES, -(-(len(samples) + N_FFT // 2) // HOP_SAMPLES))
        power = self._power(samples, n_live)
        log_power = np.full((len(self._filters), CHUNK_FRAMES), np.log10(FLOOR_POWER), np.float32)
        # frames behind the audio are silence: their power is 0, so only the live ones need the transform
        np.log10(np.maximum(self._bands(power), FLOOR_POWER), out=log_power[:, :n_live])
        np.maximum(log_power, log_power.max() - DYNAMIC_RANGE_LOG10, out=log_power)
        log_power += 4.0
        log_power /= 4.0
        return log_power

    def _bands(self, power: Floats) -> Floats:
        """float32 [n_frames, 201] to [n_mels, n_frames], in products of few frames."""
        n_frames, n_bins = power.shape
        blocks = np.zeros((-(-n_frames // PRODUCT_FRAMES), PRODUCT_FRAMES, n_bins), np.float32)
        blocks.reshape(-1, n_bins)[:n_frames] = power
        bands: Floats = (blocks @ self._filters.T).reshape(-1, len(self._filters))[:n_frames].T
        return bands

    def _power(self, samples: Floats, n_frames: int) -> Floats:
        """float32 [n_frames, 201]: squared magnitudes of the first frames of the padded audio."""
        half = N_FFT // 2
        n_needed = (n_frames - 1) * HOP_SAMPLES + N_FFT
        padded = np.zeros(WINDOW_SAMPLES, np.float32)
        padded[: len(samples)] = samples
        reflected = np.pad(padded, half, mode="reflect")[:n_needed]
        frames = np.lib.stride_tricks.sliding_window_view(reflected, N_FFT)[::HOP_SAMPLES]
        spectrum = np.fft.rfft(frames * self._hann, axis=1)
        power: Floats = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        return power


def mel_filters(n_mels: int) -> Floats:
    """Slaney's mel filterbank with area normalisation, as ``librosa.filters.mel``; float32 [n_mels, 201]."""
    fft_hz = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE_HZ)
    edges_hz = _mel_to_hz(np.linspace(0.0, _hz_to_mel(SAMPLE_RATE_HZ / 2), n_mels + 2))
    widths_hz = np.diff(edges_hz)
    ramps = edges_hz[:, None] - fft_hz[None, :]
    rising = -ramps[:-2] / widths_hz[:-1, None]
    falling = ramps[2:] / widths_hz[1:, None]
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights *= (2.0 / (edges_hz[2:] - edges_hz[:-2]))[:, None]
    filters: Floats = weights.astype(np.float32)
    return filters


LINEAR_HZ_PER_MEL = 200.0 / 3  # Slaney: linear below 1 kHz, 27 logarithmic steps per factor 6.4 above
BREAK_HZ = 1000.0
BREAK_MEL = BREAK_HZ / LINEAR_HZ_PER_MEL
LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    return float(BREAK_MEL + np.log(hz / BREAK_HZ) / LOG_STEP) if hz >= BREAK_HZ else hz / LINEAR_HZ_PER_MEL


def _mel_to_hz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mels < BREAK_MEL, mels * LINEAR_HZ_PER_MEL, BREAK_HZ * np.exp(LOG_STEP * (mels - BREAK_MEL)))
