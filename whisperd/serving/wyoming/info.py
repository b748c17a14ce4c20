"""The answer to ``describe``: the program and its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from whisperd.serving.interface import ModelCard
from whisperd.speech.languages import LANGUAGES
from whisperd.version import VERSION

if TYPE_CHECKING:
    from wyoming.event import Event

PROGRAM = "whisperd"
ENGLISH_ONLY = ".en"  # how the names of models end that know no other language
HOME = "https://huggingface.co"


def info_event(cards: Sequence[ModelCard]) -> Event:
    """One program with the declared models, the default one first. Languages of a model that is not loaded go by its
    name."""
    from wyoming.info import AsrModel, AsrProgram, Attribution, Info

    models = [
        AsrModel(
            name=card.id,
            attribution=Attribution(name=card.id.partition("/")[0], url=HOME),
            installed=True,
            description=card.source or card.id,
            version=card.revision,
            languages=list(card.languages or (["en"] if card.id.endswith(ENGLISH_ONLY) else LANGUAGES)),
        )
        for card in cards
    ]
    program = AsrProgram(
        name=PROGRAM,
        attribution=Attribution(name=PROGRAM, url=HOME),
        installed=True,
        description="Whisper, many requests at a time",
        version=VERSION,
        models=models,
        supports_transcript_streaming=True,
    )
    return Info(asr=[program]).event()
