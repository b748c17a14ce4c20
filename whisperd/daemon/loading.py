"""From a snapshot on disk to a model that has answered once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from whisperd.batcher import Batcher
from whisperd.engine import EngineSettings, open_engine
from whisperd.engine.base import DecodeRequest, WindowFailure
from whisperd.errors import EngineError
from whisperd.pipeline import LoadedModel
from whisperd.tokens import Vocabulary
from whisperd.transcript import SAMPLE_RATE_HZ
from whisperd.vad import SpeechDetector

log = logging.getLogger(__name__)


def load(name: str, snapshot: Path, settings: EngineSettings, work_dir: Path, detector: SpeechDetector) -> LoadedModel:
    """Loads a model and runs one real inference; raises SourceError or EngineError.

    ``work_dir`` is where conversions of this cache are kept.
    """
    started_s = time.monotonic()
    vocabulary = Vocabulary.load(snapshot)
    engine = open_engine(snapshot, vocabulary, settings, work_dir)
    model = LoadedModel(name=name, vocabulary=vocabulary, batcher=Batcher(engine, name=name), detector=detector)
    try:
        warm_up(model)
    except EngineError:
        model.batcher.close()
        raise
    info = engine.info
    took_s = time.monotonic() - started_s
    log.info("model %s ready on %s (%s) in %.1f s", name, info.device, info.compute_type, took_s)
    return model


def warm_up(model: LoadedModel) -> None:
    """Decodes a second of silence: whatever is wrong with the device shows here and not in a user's request."""
    ticket = model.batcher.ticket()
    try:
        ticket.submit(np.zeros(SAMPLE_RATE_HZ, np.float32), DecodeRequest(language="en"))
        outcome = ticket.collect()
    finally:
        ticket.close()
    if isinstance(outcome, WindowFailure):
        raise EngineError(f"model {model.name} failed its first inference: {outcome.error}") from outcome.error
