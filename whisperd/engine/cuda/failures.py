"""Translates what PyTorch raises into the errors of whisperd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from whisperd.errors import EngineError, OutOfMemory


@contextmanager
def translated() -> Iterator[None]:
    """Raises OutOfMemory or EngineError in place of what torch raises inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the device has not enough memory: {error}") from error
    except RuntimeError as error:
        exhausted = "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
        raise (OutOfMemory if exhausted else EngineError)(f"PyTorch failed: {error}") from error
