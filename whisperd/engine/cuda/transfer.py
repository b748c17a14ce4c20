"""From the host to the device without waiting for it: what is copied lies in pinned memory until it has gone.

PyTorch hands pinned memory out again only after the copy from it is done. THIS PART HAS NEVER RUN ON A GPU; elsewhere
the same functions make plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
