"""The audio of one utterance on its way to the disk, as a wav file that ffmpeg reads like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from whisperd.errors import AudioTooLong, FileTooLarge, RequestError
from whisperd.serving.spool import SpoolFile
from whisperd.serving.wyoming.request import WAV_BYTES_MAX, WAV_HEADER, Format, parse_format, wav_header

if TYPE_CHECKING:
    from wyoming.event import Event


class Recording:
    """Takes the chunks of one utterance.

    Args:
        file: empty; closed by whoever opened it.
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
        """How long it sounds."""
        return self._format.duration_s(self.n_bytes) if self._format else 0.0

    def add(self, chunk: Event) -> None:
        """Appends an ``audio-chunk``; each says itself what it is.

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

    def finished(self) -> BinaryIO:
        """The file, standing at its beginning; raises RequestError when nothing was recorded."""
        if self._format is None or self.n_bytes < self._format.frame_bytes:
            raise RequestError("no audio came before audio-stop")
        file = self._file.rewound()
        file.write(wav_header(self._format, self.n_bytes))
        return self._file.rewound()
