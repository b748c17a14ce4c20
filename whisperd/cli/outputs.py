"""Writes transcripts to stdout or to files, which are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whisperd.files import write_atomically

if TYPE_CHECKING:
    from whisperd.speech.subtitles import Layout
    from whisperd.speech.transcript import Transcript

FORMATS = ("txt", "srt", "vtt", "tsv", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The output of a batch: formats, and a directory or stdout (None)."""

    formats: tuple[str, ...]
    directory: Path | None
    names: Mapping[Path, Path]
    layout: Layout | None = None

    def targets(self, path: Path) -> list[Path]:
        """The output files of a recording, in the order of the formats."""
        if self.directory is None:
            return []
        name = self.names[path]
        return [self.directory / name.with_name(f"{name.name}.{kind}") for kind in self.formats]

    def prepare(self) -> None:
        """Makes the directory, before anything is sent; raises OSError if it cannot be written."""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.directory))

    def is_done(self, path: Path) -> bool:
        """True if all output files of a recording exist."""
        targets = self.targets(path)
        return bool(targets) and all(target.is_file() for target in targets)

    def write(self, path: Path, transcript: Transcript) -> list[Path]:
        """Writes the files of a recording; raises OSError. A file that exists is whole: batches are resumed by it."""
        targets = self.targets(path)
        for target, kind in zip(targets, self.formats, strict=True):
            write_atomically(target, written(transcript, kind, self.layout))
        return targets


def written(transcript: Transcript, kind: str, layout: Layout | None = None) -> str:
    """Formats a transcript; ``layout`` is for subtitles."""
    from whisperd.speech import formats

    writers: Mapping[str, Callable[[Transcript], str]] = {
        "txt": formats.txt,
        "srt": lambda whole: formats.srt(whole, layout),
        "vtt": lambda whole: formats.vtt(whole, layout),
        "tsv": formats.tsv,
        "json": formats.json,
    }
    return writers[kind](transcript)
