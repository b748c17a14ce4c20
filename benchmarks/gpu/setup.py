"""Where and with what everything runs: the device, the weights, and an engine that writes texts of forced lengths."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.roofline import Device
from whisperd.engine.base import Window
from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda import memory
from whisperd.engine.cuda.engine import DTYPES, CudaEngine
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Runner
from whisperd.speech.tokenizer import Vocabulary


class ForcedEngine(CudaEngine):
    """Writes texts of lengths that were decided before, without timestamps."""

    length: Callable[[Window], int]

    def plan(self, window: Window, language: str) -> RowPlan:
        """The plan of the engine with a length."""
        found = super().plan(window, language)
        length = self.length(window)
        prefix = (*found.prefix, self.vocabulary.no_timestamps)
        return replace(found, prefix=prefix, timestamps=False, min_tokens=length, max_tokens=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """``snapshot`` holds a tokenizer, and the model for the daemon where none is drawn; ``slots`` 0: as many as fit."""

    device: str
    compute_type: str
    slots: int
    peaks: Device
    snapshot: Path
    fp8: bool = False

    @property
    def vocabulary(self) -> Vocabulary:
        """Tokens of the snapshot."""
        return Vocabulary.load(self.snapshot)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed with."""
        return DTYPES[self.compute_type]

    @property
    def place(self) -> torch.device:
        """The device, for PyTorch."""
        return torch.device(self.device)

    def runner(self, found: Checkpoint) -> Runner:
        """Weights that are in memory already, on the device."""
        slots = self.slots or self._fitting(found)
        return Runner(found, self.vocabulary, device=self.place, dtype=self.dtype, slots=slots, fp8_cross=self.fp8)

    def opened(self, found: Checkpoint) -> ForcedEngine:
        """The engine on them."""
        return ForcedEngine(self.runner(found), self.vocabulary, compute_type=self.compute_type)

    def synchronize(self) -> None:
        """Waits until the device has done all that it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def start_afresh(self) -> None:
        """Gives back what nobody uses, for the next one looks at what is free; the peak of the memory counts anew."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _fitting(self, found: Checkpoint) -> int:
        free_bytes, _ = torch.cuda.mem_get_info()
        return memory.slots(found.shape, self.dtype.itemsize, free_bytes)


def missing(*modules: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in modules if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # somebody has forbidden it
        return False
