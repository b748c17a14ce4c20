"""Copies numbers and audio to the device without waiting for it, and computes log-mel spectrograms there.

Host memory is pinned. It HAS NEVER RUN ON A GPU; on the CPU the same functions make plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from whisperd.speech.features import DYNAMIC_RANGE_LOG10, FLOOR_POWER, HOP_SAMPLES, N_FFT, mel_filters
from whisperd.speech.units import WINDOW_SAMPLES


def uploaded(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, or rows of them, as a tensor on the device."""
    here = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def uploaded_audio(samples: Sequence[NDArray[np.float32]], device: torch.device) -> Tensor:
    """float32 [n, 480000]: windows (float32 [up to 480000] each) with silence behind them."""
    here = torch.zeros((len(samples), WINDOW_SAMPLES), pin_memory=device.type == "cuda")
    for row, one in zip(here.numpy(), samples, strict=True):
        row[: len(one)] = one
    return here.to(device, non_blocking=True)


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
