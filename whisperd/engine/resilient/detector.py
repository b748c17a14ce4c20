"""Where speech is found while engines come and go: on the engine's device, or else on the CPU."""

from __future__ import annotations

import logging

from whisperd.engine.base import HasDetector
from whisperd.errors import EngineError
from whisperd.speech.units import Floats
from whisperd.speech.vad import SpeechNetwork

log = logging.getLogger(__name__)


class FallbackDetector:
    """A ``whisperd.speech.vad.SpeechNetwork`` that does not fail with the engine.

    The networks give the same within 1e-5 and remember nothing, so each stretch may be heard by another one.

    Args:
        engine: its detector is asked first, where it has one.
        otherwise: takes over what that one cannot do.
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
                log.warning("the engine cannot hear, the cpu does: %s", error)
        return self._otherwise.run(frames, hidden, cell)
