"""From a snapshot on disk to a model that has answered once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from whisperd.daemon.memory import weights_bytes
from whisperd.daemon.models import ModelInstance
from whisperd.engine.base import DecodeRequest, Engine, HasDetector, Outcome, Window, WindowFailure
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.engine.resilient.detector import FallbackDetector
from whisperd.engine.resilient.engine import ResilientEngine
from whisperd.engine.resilient.reopener import Open, Openers
from whisperd.errors import EngineError, Error, OutOfMemory
from whisperd.metrics import ModelMeter
from whisperd.metrics.prometheus import Metrics
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ
from whisperd.speech.vad import SpeechDetector, SpeechNetwork, SpeechStream
from whisperd.transcription.batcher import Batcher
from whisperd.transcription.model import LoadedModel

log = logging.getLogger(__name__)

CPU_COMPUTE_TYPES = ("auto", "int8", "int8_float32", "float32")
FIRST_WINDOW = 0  # requests' windows begin at 1

OpenWith = Callable[[EngineSettings], Engine]
Opener = Callable[[Path, Vocabulary, EngineSettings, Path, ModelMeter], Engine]


class ModelOpener:
    """Opens the models of one daemon. Blocks; used by one thread at a time.

    Args:
        settings: how engines are opened.
        work_dir: where conversions are kept.
        metrics: counts loads, and the events of the models.
        opener: makes engines.
    """

    def __init__(
        self, settings: EngineSettings, work_dir: Path, metrics: Metrics, *, opener: Opener = open_engine
    ) -> None:
        self._settings = settings
        self._work_dir = work_dir
        self._metrics = metrics
        self._opener = opener
        self._detector: SpeechDetector | None = None

    def open(self, name: str, snapshot: Path, *, again: bool = False, beside: bool = False) -> ModelInstance:
        """Loads a model; see ``load``. ``again``: the instance before it failed."""
        if self._detector is None:
            self._detector = SpeechDetector()
        started_s = time.monotonic()
        meter = self._metrics.model(name)
        model = load(name, snapshot, self._settings, self._work_dir, self._detector, meter, self._opener, beside=beside)
        if model.batcher.info.device != "cpu":
            self._settings = replace(self._settings, device="cuda")  # from now on its absence is a loss, and no choice
        self._metrics.observe_load(name, time.monotonic() - started_s, again=again)
        return ModelInstance(model=replace(model, memory_bytes=weights_bytes(snapshot)), snapshot=snapshot)

    def open_all(self, snapshots: Mapping[str, Path], *, beside: bool = False) -> dict[str, ModelInstance]:
        """Loads models by name: all of them, or none when one raises Error."""
        opened: dict[str, ModelInstance] = {}
        try:
            for name, snapshot in snapshots.items():
                opened[name] = self.open(name, snapshot, beside=beside)
        except Error:
            for instance in opened.values():
                instance.model.batcher.close()
            raise
        return opened

    def takes_all(self, instance: ModelInstance) -> bool:
        """Whether the instance has all memory of its device, so that no other one fits beside it."""
        return instance.model.batcher.info.device != "cpu" and not self._settings.gpu_bytes


def load(
    name: str,
    snapshot: Path,
    settings: EngineSettings,
    work_dir: Path,
    detector: SpeechNetwork,
    meter: ModelMeter | None = None,
    opener: Opener = open_engine,
    *,
    beside: bool = False,
) -> LoadedModel:
    """Loads a model and runs one real inference; its engine is opened again whenever it fails.

    Where the memory is not enough, half the batch is tried, down to one window and one worker.

    Args:
        name: of the model, for messages.
        snapshot: its files.
        settings: how the engine is opened.
        work_dir: where conversions of this cache are kept.
        detector: finds speech for it, unless its engine has a detector.
        meter: gets its events.
        opener: makes the engine.
        beside: models that leave are still in memory: an engine for less than the whole batch is a failure then.

    Raises:
        SourceError: the files are no model.
        EngineError: the device cannot run it.
    """
    meter = meter or ModelMeter()
    started_s = time.monotonic()
    vocabulary = Vocabulary.load(snapshot)

    def open_one(settings: EngineSettings) -> Engine:
        return _prove(name, opener(snapshot, vocabulary, settings, work_dir, meter))

    engine = _resilient(name, open_one, settings, meter, beside=beside)
    info, took_s = engine.info, time.monotonic() - started_s
    log.info("model %s ready on %s (%s) in %.1f s", name, info.device, info.compute_type, took_s)
    if lost := engine.health.fallback:
        log.warning("model %s is served by the cpu instead of the GPU: %s", name, lost)
    batcher, network = Batcher(engine, name=name, meter=meter), FallbackDetector(engine, detector)
    return LoadedModel(name=name, vocabulary=vocabulary, batcher=batcher, detector=network)


def _resilient(
    name: str, open_one: OpenWith, settings: EngineSettings, meter: ModelMeter, *, beside: bool
) -> ResilientEngine:
    fallback = partial(_open_fitting, name, open_one, on_cpu(settings), meter)
    has_fallback = settings.cpu_fallback and settings.device != "cpu"
    first = partial(open_one, settings) if beside else partial(_open_fitting, name, open_one, settings, meter)
    engine, lost = _open_first(first, fallback if has_fallback else None, beside=beside)
    on_gpu = engine.info.device != "cpu"
    if on_gpu:
        settings = replace(settings, device="cuda")  # when a GPU that was there is gone, it is lost, also for "auto"
    main = partial(_open_fitting, name, open_one, settings, meter)
    openers = Openers(main=main, fallback=fallback if has_fallback and (on_gpu or lost) else None)
    return ResilientEngine(engine, openers, name=name, fallback=lost, meter=meter)


def _open_first(main: Open, fallback: Open | None, *, beside: bool) -> tuple[Engine, str]:
    """An engine, and the reason when it is the fallback."""
    try:
        return main(), ""
    except EngineError as error:
        if fallback is None or (beside and isinstance(error, OutOfMemory)):
            raise
        return fallback(), str(error) or "it cannot be opened"


def _open_fitting(name: str, open_one: OpenWith, settings: EngineSettings, meter: ModelMeter) -> Engine:
    while True:
        try:
            return open_one(settings)
        except OutOfMemory as error:
            # an engine on a GPU has tried fewer windows itself, and these options are not for it
            if settings.device == "cuda" or (settings.batch_size == 1 and settings.workers == 1):
                raise
            settings = smaller(settings)
            log.warning("model %s: %s; trying with batches of %d", name, error, settings.batch_size)
            meter.count_halving("load")


def smaller(settings: EngineSettings) -> EngineSettings:
    """Half the batch; when that is one window already, one worker."""
    if settings.batch_size > 1:
        return replace(settings, batch_size=settings.batch_size // 2)
    return replace(settings, workers=1)


def on_cpu(settings: EngineSettings) -> EngineSettings:
    """The same on the CPU, in a number format that it has."""
    compute_type = settings.compute_type if settings.compute_type in CPU_COMPUTE_TYPES else "auto"
    return replace(settings, device="cpu", compute_type=compute_type)


def _prove(name: str, engine: Engine) -> Engine:
    """Decodes a second of silence: a fault of the device shows here and not in a user's request."""
    try:
        _warm_up(name, engine)
    except BaseException:
        engine.close()
        raise
    return engine


def _warm_up(name: str, engine: Engine) -> None:
    silence, request = np.zeros(SAMPLE_RATE_HZ, np.float32), DecodeRequest(language="en")
    if isinstance(engine, HasDetector) and engine.detector is not None:
        SpeechStream(engine.detector).feed(silence)
    engine.admit([Window(id=FIRST_WINDOW, samples=silence, request=request)])
    outcome: Outcome | None = None
    while outcome is None:
        outcome = next(iter(engine.step()), None)
    if isinstance(outcome, WindowFailure):
        kind = OutOfMemory if isinstance(outcome.error, OutOfMemory) else EngineError
        raise kind(f"model {name} failed its first inference: {outcome.error}") from outcome.error
