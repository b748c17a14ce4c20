"""What a client asks for, from its events to the terms of the service."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whisperd.errors import RequestError
from whisperd.speech.fallback import Options
from whisperd.speech.tokenizer import language_code

RATE_MIN_HZ, RATE_MAX_HZ = 1000, 384_000
WIDTHS_BYTES = (1, 2, 3, 4)
CHANNELS_MAX = 8
WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
WAV_BYTES_MAX = 0xFFFF_FFFF - WAV_HEADER.size  # its lengths have 32 bits
PCM = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A ``transcribe`` event. A ``model`` of None is the default one."""

    options: Options
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How samples come: ``width_bytes`` each (of one byte: unsigned, as in a wav file), channels interleaved."""

    rate_hz: int
    width_bytes: int
    channels: int

    @property
    def frame_bytes(self) -> int:
        """All channels of one moment."""
        return self.width_bytes * self.channels

    def duration_s(self, n_bytes: int) -> float:
        """How long so many bytes sound."""
        return n_bytes / self.frame_bytes / self.rate_hz


def parse_request(data: Mapping[str, Any], defaults: Options) -> Request:
    """A ``transcribe`` event; raises RequestError.

    Names come before terms, as the protocol ranks them: of too many hot words the last are dropped. The context of
    earlier turns has no form that is agreed upon, so nothing is made of it.
    """
    language = _text(data, "language")
    words = (*_texts(data, "transcript_names"), *_texts(data, "transcript_terms"))
    options = replace(defaults, hotwords=(*defaults.hotwords, *words))
    if language and language.lower() != "auto":
        options = replace(options, language=language_code(language[:80]))
    return Request(options=options, model=_text(data, "name"))


def parse_format(data: Mapping[str, Any]) -> Format:
    """The format of an ``audio-start`` or ``audio-chunk``; raises RequestError."""
    return Format(
        rate_hz=_whole(data, "rate", range(RATE_MIN_HZ, RATE_MAX_HZ + 1), f"{RATE_MIN_HZ} to {RATE_MAX_HZ} Hz"),
        width_bytes=_whole(data, "width", WIDTHS_BYTES, "1, 2, 3 or 4 bytes"),
        channels=_whole(data, "channels", range(1, CHANNELS_MAX + 1), f"1 to {CHANNELS_MAX}"),
    )


def wav_header(found: Format, n_bytes: int) -> bytes:
    """What makes a wav file of ``n_bytes`` of samples that follow."""
    return WAV_HEADER.pack(
        b"RIFF",
        WAV_HEADER.size - 8 + n_bytes,
        b"WAVE",
        b"fmt ",
        16,
        PCM,
        found.channels,
        found.rate_hz,
        found.rate_hz * found.frame_bytes,
        found.frame_bytes,
        found.width_bytes * 8,
        b"data",
        n_bytes,
    )


def _text(data: Mapping[str, Any], name: str) -> str | None:
    found = data.get(name)
    if found is not None and not isinstance(found, str):
        raise RequestError(f"{name} must be text, got {str(found)[:80]!r}", param=name)
    return found.strip() or None if found else None


def _texts(data: Mapping[str, Any], name: str) -> Sequence[str]:
    found = data.get(name) or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RequestError(f"{name} must be a list of texts, got {str(found)[:80]!r}", param=name)
    return [one.strip() for one in found if one.strip()]


def _whole(data: Mapping[str, Any], name: str, allowed: Sequence[int], expected: str) -> int:
    found = data.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found not in allowed:
        raise RequestError(f"{name} must be {expected}, got {str(found)[:80]!r}", param=name)
    return found
