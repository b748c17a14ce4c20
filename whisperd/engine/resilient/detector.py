"""Finds speech on the engine's device, and on the CPU when that fails."""

from __future__ import annotations

import logging

from whisperd.engine.base import HasDetector
from whisperd.errors import EngineError
from whisperd.speech.units import Floats
from whisperd.speech.vad import SpeechNetwork

log = logging.getLogger(__name__)


class FallbackDetector:
    """A ``whisperd.speech.vad.SpeechNetwork`` that does not fail with the engine.

    Both networks agree within 1e-5 and keep no state, so each stretch may go to either.

    Args:
        engine: its detector is used first, if it has one.
        otherwise: used when that one fails or there is none.
    """

    def __init__(self, engine: HasDetector, otherwise: SpeechNetwork) -> None:
        self._engine = engine
        self._otherwise = otherwise

    def run(self, frames: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
        """See ``SpeechNetwork``."""
        detector = self._engine.detector
        if detector is not None:
            try:
                return detector.run(frames, hidden, cell)
            except EngineError as error:
                log.warning("the engine cannot find speech; the cpu does: %s", error)
        return self._otherwise.run(frames, hidden, cell)
