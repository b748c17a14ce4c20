"""From a snapshot on disk to a model that has answered once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from whisperd.batcher import Batcher
from whisperd.engine import EngineSettings, open_engine
from whisperd.engine.base import DecodeRequest, Engine, Hearing, WindowFailure
from whisperd.errors import EngineError, OutOfMemory
from whisperd.meter import ModelMeter
from whisperd.pipeline import LoadedModel
from whisperd.tokens import Vocabulary
from whisperd.transcript import SAMPLE_RATE_HZ
from whisperd.vad import SpeechNetwork, SpeechStream

log = logging.getLogger(__name__)

Opener = Callable[[Path, Vocabulary, EngineSettings, Path, ModelMeter], Engine]


def load(
    name: str,
    snapshot: Path,
    settings: EngineSettings,
    work_dir: Path,
    detector: SpeechNetwork,
    meter: ModelMeter | None = None,
    opener: Opener = open_engine,
) -> LoadedModel:
    """Loads a model and runs one real inference.

    Where the memory is not enough, half the batch is tried, down to one window and one worker.

    Args:
        name: of the model, for messages.
        snapshot: its files.
        settings: how the engine is opened.
        work_dir: where conversions of this cache are kept.
        detector: finds speech for it, unless its engine does that itself.
        meter: told what happens.
        opener: makes the engine.

    Raises:
        SourceError: the files are no model.
        EngineError: the device cannot run it.
    """
    meter = meter or ModelMeter()
    vocabulary = Vocabulary.load(snapshot)
    while True:
        try:
            return _loaded(name, vocabulary, opener(snapshot, vocabulary, settings, work_dir, meter), detector, meter)
        except OutOfMemory as error:
            if settings.batch_size == 1 and settings.workers == 1:
                raise
            settings = smaller(settings)
            log.warning("model %s: %s; trying with batches of %d", name, error, settings.batch_size)
            meter.halved("load")


def smaller(settings: EngineSettings) -> EngineSettings:
    """Half the batch; when that is one window already, one worker."""
    if settings.batch_size > 1:
        return replace(settings, batch_size=settings.batch_size // 2)
    return replace(settings, workers=1)


def _loaded(
    name: str, vocabulary: Vocabulary, engine: Engine, detector: SpeechNetwork, meter: ModelMeter
) -> LoadedModel:
    started_s = time.monotonic()
    batcher = Batcher(engine, name=name, meter=meter)
    try:
        own = engine.detector if isinstance(engine, Hearing) else None
        model = LoadedModel(name=name, vocabulary=vocabulary, batcher=batcher, detector=own or detector)
        warm_up(model)
    except EngineError:
        batcher.close()
        raise
    info = engine.info
    took_s = time.monotonic() - started_s
    log.info("model %s ready on %s (%s) in %.1f s", name, info.device, info.compute_type, took_s)
    return model


def warm_up(model: LoadedModel) -> None:
    """Hears and decodes a second of silence: what is wrong with the device shows here and not in a user's request."""
    silence = np.zeros(SAMPLE_RATE_HZ, np.float32)
    SpeechStream(model.detector).feed(silence)
    ticket = model.batcher.ticket()
    try:
        ticket.submit(silence, DecodeRequest(language="en"))
        outcome = ticket.collect()
    finally:
        ticket.close()
    if isinstance(outcome, WindowFailure):
        kind = OutOfMemory if isinstance(outcome.error, OutOfMemory) else EngineError
        raise kind(f"model {model.name} failed its first inference: {outcome.error}") from outcome.error
