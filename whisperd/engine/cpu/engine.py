"""Whisper on CTranslate2: a batch runs to its end in one call; several workers keep all cores busy.

Workers pull: a free worker takes the waiting windows that may share a batch. A window never waits for a batch to fill,
and batches grow under load.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from whisperd.engine.base import (
    STEP_S,
    EngineHealth,
    EngineInfo,
    Outcome,
    Window,
    WindowFailure,
)
from whisperd.engine.cpu.batching import AdaptiveBatchLimit, ReadyQueue
from whisperd.engine.cpu.decoder import BatchDecoder, is_exhaustion
from whisperd.engine.cpu.encoder import Encode, WindowEncoder, ctranslate2_encoder
from whisperd.engine.cpu.unpadded import ShortWindows
from whisperd.errors import EngineError, OutOfMemory, SourceError
from whisperd.metrics import ModelMeter
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import Floats

if TYPE_CHECKING:
    import ctranslate2

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


class Ct2Engine:
    """One loaded model; ``load`` opens it.

    Args:
        model: opened with as many ``inter_threads`` as there are workers.
        vocabulary: the model's tokens.
        batch_size: windows that one worker decodes together.
        workers: batches in flight at the same time.
        encode: replaces the model's own encoder.
        short_windows: when short audio is encoded without the silence that pads it to 30 s; see ``unpadded``.
        meter: receives the figures of each batch.
    """

    def __init__(
        self,
        model: ctranslate2.models.Whisper,
        vocabulary: Vocabulary,
        *,
        batch_size: int,
        workers: int,
        encode: Encode | None = None,
        short_windows: ShortWindows = "never",
        meter: ModelMeter | None = None,
    ) -> None:
        running = batch_size * workers
        encoder = WindowEncoder(encode or ctranslate2_encoder(model), model.n_mels, kept=running)
        self._decode = BatchDecoder(model, vocabulary, encoder, short_windows=short_windows)
        self._model = model
        self._meter = meter or ModelMeter()
        self._limit = AdaptiveBatchLimit(batch_size, self._meter)
        self._queue = ReadyQueue()
        self._inside: set[int] = set()
        self._idle_workers = 0
        self._closing = False
        self._changed = threading.Condition()
        self._finished: SimpleQueue[Sequence[Outcome]] = SimpleQueue()
        self._info = EngineInfo(
            engine="ctranslate2" if encode is None else "ctranslate2+openvino",
            device=model.device,
            compute_type=model.compute_type,
            multilingual=vocabulary.multilingual,
            languages=tuple(vocabulary.languages),
            slots=running + batch_size,
            spare_slots=batch_size,
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"ct2-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def load(
        cls,
        path: Path,
        vocabulary: Vocabulary,
        *,
        compute_type: str,
        batch_size: int,
        workers: int,
        threads_per_worker: int,
        encode: Encode | None = None,
        short_windows: ShortWindows = "never",
        meter: ModelMeter | None = None,
    ) -> Ct2Engine:
        """Opens a CTranslate2 directory on the CPU.

        Raises:
            OutOfMemory: there is no room for it.
            SourceError: it is damaged or no Whisper.
        """
        import ctranslate2

        try:
            model = ctranslate2.models.Whisper(
                str(path),
                device="cpu",
                compute_type=compute_type,
                inter_threads=workers,
                intra_threads=threads_per_worker,
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            if is_exhaustion(error):
                raise OutOfMemory(f"no memory for the model in {path}: {error}") from error
            raise SourceError(f"the model in {path} cannot be loaded: {error}") from error
        return cls(
            model,
            vocabulary,
            batch_size=batch_size,
            workers=workers,
            encode=encode,
            short_windows=short_windows,
            meter=meter,
        )

    @property
    def info(self) -> EngineInfo:
        """Constant facts about the loaded model."""
        return self._info

    @property
    def health(self) -> EngineHealth:
        """Constant here: a failed engine is replaced from outside."""
        return EngineHealth()

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        with self._changed:
            return self._info.slots - len(self._inside)

    def admit(self, windows: Sequence[Window]) -> None:
        """Queues windows for the workers."""
        with self._changed:
            self._queue.add(windows)
            self._inside.update(window.id for window in windows)
            self._changed.notify_all()

    def step(self) -> Sequence[Outcome]:
        """Waits at most ``STEP_S`` for a batch to end; returns all finished windows."""
        outcomes: list[Outcome] = []
        try:
            outcomes.extend(self._finished.get(timeout=STEP_S))
            while True:
                outcomes.extend(self._finished.get_nowait())
        except Empty:
            pass
        with self._changed:
            self._inside.difference_update(outcome.window_id for outcome in outcomes)
        return outcomes

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Drops windows that no worker has taken yet; the others run to the end of their batch."""
        with self._changed:
            self._inside -= self._queue.drop(window_ids)

    def close(self) -> None:
        """Stops the workers after the running batches, and unloads the model."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)
        self._model.unload_model()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._finished.put(self._outcomes(batch))  # all at once: the windows that follow them form a batch too

    def _next_batch(self) -> list[Window]:
        """Waits for windows; empty when the engine closes."""
        with self._changed:
            self._idle_workers += 1
            self._changed.wait_for(lambda: self._closing or self._queue.open)
            batch = [] if self._closing else self._queue.take(self._idle_workers, self._limit.now)
            self._idle_workers -= 1
            return batch

    def _outcomes(self, batch: list[Window]) -> Sequence[Outcome]:
        started_s = time.monotonic()
        try:
            encoded = self._encoded(batch)
            outcomes = self._limit.decoded(batch, partial(self._decode, encoded=encoded))
        except EngineError as error:
            return [WindowFailure(window_id=window.id, error=error) for window in batch]
        self._meter.observe_batch(len(batch), time.monotonic() - started_s)
        return outcomes

    def _encoded(self, batch: list[Window]) -> dict[int, Floats]:
        """The states of each window. Windows that arrive meanwhile join ``batch``: a larger one costs little more."""
        encoded: dict[int, Floats] = {}
        try:
            for window in batch:  # which grows
                encoded[window.id] = self._decode.encode(window)
                self._decode_interactive(window)
                with self._changed:
                    batch.extend(self._queue.join(window, self._limit.now - len(batch)))
        except OutOfMemory:
            log.warning("out of memory while encoding")  # the batch will be halved, and encodes the rest then
        return encoded

    def _decode_interactive(self, window: Window) -> None:
        """Decodes interactive windows between two windows of a bulk batch; once each, so that the batch proceeds."""
        if window.lane == "interactive":
            return
        with self._changed:
            shorter = self._queue.cut_in(self._idle_workers, self._limit.now)
        if shorter:
            self._finished.put(self._outcomes(shorter))
