"""The audio of one utterance on its way to the disk, as a wav file that ffmpeg reads like any other."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from whisperd.errors import AudioTooLong, FileTooLarge, RequestError
from whisperd.serving.spool import SpoolFile

if TYPE_CHECKING:
    from wyoming.event import Event


RATE_MIN_HZ, RATE_MAX_HZ = 1000, 384_000
WIDTHS_BYTES = (1, 2, 3, 4)
CHANNELS_MAX = 8
WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
WAV_BYTES_MAX = 0xFFFF_FFFF - WAV_HEADER.size  # its lengths have 32 bits
PCM = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Format of samples: ``width_bytes`` each (of one byte: unsigned, as in a wav file), channels interleaved."""

    rate_hz: int
    width_bytes: int
    channels: int

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return self.width_bytes * self.channels

    def duration_s(self, n_bytes: int) -> float:
        """Length of so many bytes."""
        return n_bytes / self.frame_bytes / self.rate_hz


class Recording:
    """Collects the chunks of one utterance.

    Args:
        file: empty; the caller closes it.
        audio_s: longer audio is refused.
    """

    def __init__(self, file: SpoolFile, audio_s: float) -> None:
        self._file = file
        self._audio_s = audio_s
        self._format: Format | None = None
        self.n_bytes = 0
        file.write(bytes(WAV_HEADER.size))

    @property
    def duration_s(self) -> float:
        """Length of the audio."""
        return self._format.duration_s(self.n_bytes) if self._format else 0.0

    def add(self, chunk: Event) -> None:
        """Appends an ``audio-chunk``, which carries its own format.

        Raises:
            RequestError: it has no format, or another one than those before.
            AudioTooLong: with it the utterance is.
            FileTooLarge, SpoolFull: see SpoolFile.
        """
        found = parse_format(chunk.data)
        if found != (self._format or found):
            raise RequestError(
                "the format of the audio changes in the middle of it; start a new stream with audio-start"
            )
        self._format = found
        self.n_bytes += len(chunk.payload or b"")
        if self.duration_s > self._audio_s:
            raise AudioTooLong(f"the audio is longer than the limit of {self._audio_s:g} s (limits.audio_s)")
        if self.n_bytes > WAV_BYTES_MAX:
            raise FileTooLarge(f"the audio has more than {WAV_BYTES_MAX} bytes")
        self._file.write(chunk.payload or b"")

    def finished(self) -> BinaryIO | None:
        """The file with its header, standing at its beginning; None where not even one sample has come."""
        if self._format is None or self.n_bytes < self._format.frame_bytes:
            return None
        file = self._file.rewound()
        file.write(wav_header(self._format, self.n_bytes))
        return self._file.rewound()


def parse_format(data: Mapping[str, Any]) -> Format:
    """The format of an ``audio-start`` or ``audio-chunk``; raises RequestError."""
    return Format(
        rate_hz=_whole(data, "rate", range(RATE_MIN_HZ, RATE_MAX_HZ + 1), f"{RATE_MIN_HZ} to {RATE_MAX_HZ} Hz"),
        width_bytes=_whole(data, "width", WIDTHS_BYTES, "1, 2, 3 or 4 bytes"),
        channels=_whole(data, "channels", range(1, CHANNELS_MAX + 1), f"1 to {CHANNELS_MAX}"),
    )


def wav_header(found: Format, n_bytes: int) -> bytes:
    """The header of a wav file with ``n_bytes`` of samples."""
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


def _whole(data: Mapping[str, Any], name: str, allowed: Sequence[int], expected: str) -> int:
    found = data.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found not in allowed:
        raise RequestError(f"{name} must be {expected}, got {str(found)[:80]!r}", param=name)
    return found
