"""Where the parts of a file begin that was joined byte by byte, in formats where FFmpeg stops at a new header.

Its demuxer for Ogg reads no further where the channels of a chained stream change; that for FLAC takes the frames
behind a second header for frames of the first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO

OGG_PAGE, FLAC_HEADER = b"OggS", b"fLaC"
FLAC_BEGINNINGS = (FLAC_HEADER + b"\0\0\0\x22", FLAC_HEADER + b"\x80\0\0\x22")  # with the head of STREAMINFO
PAGE_BYTES = 27  # of an Ogg page before the sizes of its segments
FLAGS_AT, SEGMENTS_AT = 5, 26
BEGINS = 2  # the flag of a stream's first page
SEARCH_BYTES = 1 << 20


def links(file: BinaryIO) -> list[tuple[int, int]]:
    """Byte ranges (start, end) of the parts, in order; the file stands at its start again."""
    file.seek(0)
    magic = file.read(len(OGG_PAGE))
    begins = _ogg_links(file) if magic == OGG_PAGE else _flac_links(file) if magic == FLAC_HEADER else iter(())
    later = sorted(at for at in begins if at)
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    return list(pairwise([0, *later, end]))


def _ogg_links(file: BinaryIO) -> Iterator[int]:
    """A link begins with the first pages of all its streams: one that follows any other page begins a new link."""
    was_first = False
    at = _found(file, 0, OGG_PAGE)
    while at is not None:
        file.seek(at)
        header = file.read(PAGE_BYTES)
        if len(header) < PAGE_BYTES:
            return
        sizes = file.read(header[SEGMENTS_AT])
        is_first = bool(header[FLAGS_AT] & BEGINS)
        if is_first and not was_first:
            yield at
        was_first = is_first
        at = _found(file, at + PAGE_BYTES + len(sizes) + sum(sizes), OGG_PAGE)


def _flac_links(file: BinaryIO) -> Iterator[int]:
    for beginning in FLAC_BEGINNINGS:
        at = _found(file, len(beginning), beginning)
        while at is not None:
            yield at
            at = _found(file, at + len(beginning), beginning)


def _found(file: BinaryIO, at: int, mark: bytes) -> int | None:
    """The first place of ``mark`` at or behind ``at``; as a rule of Ogg pages it is there."""
    n_bytes = len(mark)
    while True:
        file.seek(at)
        data = file.read(n_bytes)
        found = data.find(mark)
        if found >= 0:
            return at + found
        if len(data) < n_bytes:
            return None
        at += len(data) - len(mark) + 1
        n_bytes = SEARCH_BYTES
