"""Copies numbers and audio to the device without waiting for it, and computes log-mel spectrograms there.

Host memory is pinned. It HAS NEVER RUN ON A GPU; on the CPU the same functions make plain tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.speech.features import DYNAMIC_RANGE_LOG10, FLOOR_POWER, HOP_SAMPLES, N_FFT, mel_filters
from whisperd.speech.units import WINDOW_SAMPLES, Floats


def uploaded(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, or rows of them, as a tensor on the device."""
    here = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


class AudioStage:
    """Host memory, pinned once, through which the audio of windows goes to the device.

    A copy into it takes about as long as a decode step of a large model, and runs while the device works.

    Args:
        places: windows that lie in it at the same time; at least as many as are sent together.
        device: where they go.
    """

    def __init__(self, places: int, device: torch.device) -> None:
        self._device = device
        self._audio = torch.zeros((places, WINDOW_SAMPLES), pin_memory=device.type == "cuda")
        self._views = self._audio.numpy()
        self._lengths = [0] * places
        self._free = deque(range(places))
        self._staged: dict[int, int] = {}
        self._sent: dict[int, torch.cuda.Event] = {}

    def put(self, key: int, samples: Floats) -> None:
        """Copies float32 [n], n <= 480000, under a key; nothing happens when all places are taken."""
        if key not in self._staged and self._free:
            self._staged[key] = self._write(samples)

    def send(self, audio: Sequence[Floats], keys: Sequence[int] | None = None) -> Tensor:
        """Windows as float32 [n, 480000] on the device, with silence behind them; ``put`` may have copied them here."""
        self._forget_all_but(set(keys or ()), len(audio))
        own: Sequence[int | None] = keys or [None] * len(audio)
        places = [self._place(key, samples) for key, samples in zip(own, audio, strict=True)]
        found = torch.empty((len(places), WINDOW_SAMPLES), device=self._device)
        for row, place in zip(found, places, strict=True):
            row.copy_(self._audio[place], non_blocking=True)
        if self._device.type == "cuda":
            sent = torch.cuda.Event()
            sent.record()
            self._sent |= dict.fromkeys(places, sent)
        self._free.extend(places)
        return found

    def _forget_all_but(self, keys: set[int], n_needed: int) -> None:
        """Frees places when there may be too few: of windows that were cancelled, or are not sent now."""
        if len(self._free) < n_needed:
            self._free.extend(self._staged.pop(key) for key in list(self._staged) if key not in keys)

    def _place(self, key: int | None, samples: Floats) -> int:
        found = self._staged.pop(key, None) if key is not None else None
        return self._write(samples) if found is None else found

    def _write(self, samples: Floats) -> int:
        place = self._free.popleft()  # the place that was sent first
        if place in self._sent:
            self._sent.pop(place).synchronize()
        self._views[place, : len(samples)] = samples
        self._views[place, len(samples) : self._lengths[place]] = 0.0  # the silence behind it is there already
        self._lengths[place] = len(samples)
        return place


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
