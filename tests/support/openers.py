"""Openers of engines that a test runs in a process of their own; none needs pytest."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from whisperd.engine.base import Engine, EngineHealth, EngineInfo, Hypothesis, Outcome, Window
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.errors import OutOfMemory, SourceError
from whisperd.metrics import ModelMeter
from whisperd.speech.tokenizer import Vocabulary


class Cramped:
    """A real model on a device with memory for a limited number of windows."""

    def __init__(self, model: Any, room: int) -> None:
        self._model = model
        self._room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, states: Any, *arguments: Any, **options: Any) -> Any:
        if states.shape[0] > self._room:
            raise MemoryError("std::bad_alloc")
        return self._model.generate(states, *arguments, **options)


def ct2(snapshot: Path, meter: ModelMeter) -> Engine:
    return Ct2Engine.load(
        snapshot,
        Vocabulary.load(snapshot),
        compute_type="float32",
        batch_size=3,
        workers=2,
        threads_per_worker=1,
        meter=meter,
    )


def cuda(snapshot: Path, meter: ModelMeter) -> Engine:
    """The engine of GPUs, on the CPU in float32."""
    import torch

    from whisperd.engine.cuda.engine import CudaEngine

    torch.set_num_threads(1)
    return CudaEngine.load(snapshot, Vocabulary.load(snapshot), device="cpu", slots=4, meter=meter)


def cramped_ct2(snapshot: Path, room: int, meter: ModelMeter) -> Engine:
    model = ctranslate2.models.Whisper(str(snapshot), device="cpu", compute_type="float32", intra_threads=1)
    return Ct2Engine(Cramped(model, room), Vocabulary.load(snapshot), batch_size=6, workers=1, meter=meter)


def ct2_in_little_room(snapshot: Path, batch_size: int, room: int, meter: ModelMeter) -> Engine:
    """Opens an engine whose batches have a limited size."""
    if batch_size > room:
        raise OutOfMemory(f"no room for batches of {batch_size}")
    model = ctranslate2.models.Whisper(str(snapshot), device="cpu", compute_type="float32", intra_threads=1)
    return Ct2Engine(model, Vocabulary.load(snapshot), batch_size=batch_size, workers=1, meter=meter)


def no_memory(_: ModelMeter) -> Engine:
    raise OutOfMemory("no room for the model")


def no_model(_: ModelMeter) -> Engine:
    raise SourceError("this is no model")


def no_luck(_: ModelMeter) -> Engine:
    raise ValueError("a surprise")


def no_time(_: ModelMeter) -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Doubler:
    def run(self, *arrays: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        if not len(arrays[0]):
            raise OutOfMemory("nothing to double")
        return tuple(2 * array for array in arrays)


class Echo:
    """Answers each window with its number of samples as the only token, and misbehaves as its length asks."""

    def __init__(self) -> None:
        self.health = EngineHealth()
        self.info = EngineInfo(
            engine="echo", device="cpu", compute_type="float32", multilingual=False, languages=("en",), slots=8
        )
        self.detector = Doubler()
        self._windows: list[Window] = []

    @property
    def free_slots(self) -> int:
        return self.info.slots - len(self._windows)

    def admit(self, windows: Sequence[Window]) -> None:
        self._windows += windows

    def step(self) -> Sequence[Outcome]:
        done, self._windows = self._windows, []
        for window in done:
            if len(window.samples) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            if len(window.samples) == 29:
                sum(range(10**15))  # in C, and no other thread of the process runs meanwhile
            if len(window.samples) == 19:
                os.kill(os.getpid(), signal.SIGSTOP)
        return [
            Hypothesis(
                window_id=window.id,
                language=os.environ.get("NOTIFY_SOCKET", "en"),
                language_probability=1.0,
                tokens=(len(window.samples), int(window.samples.sum())),
                avg_logprob=-0.1,
                no_speech_prob=0.0,
                temperature=0.0,
            )
            for window in done
        ]

    def cancel(self, window_ids: frozenset[int]) -> None:
        self._windows = [window for window in self._windows if window.id not in window_ids]

    def close(self) -> None:
        pass


def echo(_: ModelMeter) -> Engine:
    return Echo()
