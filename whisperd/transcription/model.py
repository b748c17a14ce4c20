"""A model that is loaded and serves."""

from __future__ import annotations

from dataclasses import dataclass

from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechNetwork
from whisperd.transcription.batcher import Batcher


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Everything that a request needs of a model. ``memory_bytes`` is its share of limits.model_bytes."""

    name: str
    vocabulary: Vocabulary
    batcher: Batcher
    detector: SpeechNetwork
    memory_bytes: int = 0
