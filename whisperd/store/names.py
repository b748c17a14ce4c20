"""Names of files as a Hub, a manifest or a record gives them, and the only way to a path that is built of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from whisperd.errors import StoreError

COMPONENT_BYTES = 255  # what Linux file systems take
NAME_BYTES = 1024
SHOWN_CHARS = 80
SHOWN_NAMES = 3


def problem_of(name: str) -> str:
    """Why a name cannot be that of a file below a directory; empty if it can."""
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        return "has control characters"
    if "\\" in name:
        return "has a backslash"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is not a relative name without '..'"
    if len(name.encode()) > NAME_BYTES or any(len(part.encode()) > COMPONENT_BYTES for part in parts):
        return "is longer than a file system takes"
    return ""


def inside(directory: Path, *components: str) -> Path:
    """The path of ``components`` below ``directory``.

    Every path that the store writes, renames or deletes comes from here.

    Raises:
        StoreError: a component is no plain file name, so that the path could lead out of the directory.
    """
    for component in components:
        problem = "has a slash" if "/" in component else problem_of(component)
        if problem:
            raise StoreError(f"{directory}: refused to use the file name {shown(component)}, which {problem}")
    return directory.joinpath(*components)


def shown(value: object) -> str:
    """A foreign value for messages: in quotes, printable, and never long."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def listing(names: Sequence[str]) -> str:
    """``a, b, c and 7 more``: names for messages, the first few."""
    few = [name if name.isprintable() and len(name) <= SHOWN_CHARS else shown(name) for name in names[:SHOWN_NAMES]]
    text = ", ".join(few)
    return f"{text} and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else text
