"""Finds the files that the arguments of a command name, and names their results."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from whisperd.errors import UsageError

STDIN = Path("-")
# in a directory only these are taken for recordings; a file that is named itself may be called anything
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in [
        "3gp",
        "aac",
        "ac3",
        "aif",
        "aiff",
        "amr",
        "asf",
        "au",
        "avi",
        "caf",
        "flac",
        "flv",
        "m4a",
        "m4b",
        "m4v",
        "mka",
        "mkv",
        "mov",
        "mp2",
        "mp3",
        "mp4",
        "mpeg",
        "mpg",
        "mpga",
        "oga",
        "ogg",
        "opus",
        "ts",
        "wav",
        "webm",
        "wma",
        "wmv",
    ]
)


def expand(given: Iterable[Path]) -> Mapping[Path, Path]:
    """Maps every file, once and in order, to the path of its result below the output directory, without a suffix.

    Directories are searched recursively and keep their structure; patterns that the shell has not expanded are
    expanded. Raises UsageError for a directory without recordings, and when two results would have one name.
    """
    found: dict[Path, Path] = {}
    for path in given:
        for file, name in _files(path):
            found.setdefault(file, name)
    return _distinct(found)


def _files(path: Path) -> Iterator[tuple[Path, Path]]:
    if path == STDIN:
        yield path, Path("stdin")
    elif path.is_dir():
        files = sorted(_recordings(path))
        if not files:
            raise UsageError(f"no recordings in {path}; they are known by endings such as .mp3, .wav or .mp4")
        yield from ((file, file.relative_to(path)) for file in files)
    elif not path.exists() and glob.has_magic(str(path)):
        for match in sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) or [path]:
            yield from _files(match) if match.is_dir() else [(match, Path(match.name))]
    else:
        yield path, Path(path.name)


def _recordings(directory: Path) -> Iterator[Path]:
    for place, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(place) / name


def _distinct(found: Mapping[Path, Path]) -> Mapping[Path, Path]:
    """Removes the suffixes where the names differ without them."""
    stems = Counter(_stem(name) for name in found.values())
    names = {path: name if stems[_stem(name)] > 1 else _stem(name) for path, name in found.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise UsageError(f"two inputs are called {twice[0]}; transcribe them one after the other with their own -d")
    return names


def _stem(name: Path) -> Path:
    return name.with_suffix("")


def count_stdin(given: Sequence[Path]) -> int:
    """The number of arguments that name stdin."""
    return list(given).count(STDIN)
