"""The features of ``whisperd.speech.features`` for many windows at once, on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.speech.features import DYNAMIC_RANGE_LOG10, FLOOR_POWER, HOP_SAMPLES, N_FFT, mel_filters


class DeviceLogMel:
    """Log-mel spectrograms, in float32 whatever the model computes with."""

    def __init__(self, n_mels: int, device: torch.device) -> None:
        self._filters = torch.from_numpy(mel_filters(n_mels)).to(device)
        self._hann = torch.hann_window(N_FFT, device=device)

    def __call__(self, samples: Tensor) -> Tensor:
        """float32 [windows, 480000] to float32 [windows, n_mels, 3000]; each window is scaled by its own maximum."""
        half = N_FFT // 2
        padded = functional.pad(samples[:, None], (half, half), mode="reflect")[:, 0]
        spectrum = torch.stft(padded, N_FFT, HOP_SAMPLES, window=self._hann, center=False, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        log_power = (self._filters @ power).clamp(min=FLOOR_POWER).log10()
        floor = log_power.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE_LOG10
        return (torch.maximum(log_power, floor) + 4.0) / 4.0
