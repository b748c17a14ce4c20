"""Files that were joined byte by byte are split into their parts."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from whisperd.speech.chains import links


def page(flags: int, body: bytes = b"x" * 300) -> bytes:
    sizes = bytes([255] * (len(body) // 255) + [len(body) % 255])
    return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([len(sizes)]) + sizes + body


FIRST, LATER = page(2), page(0)
FLAC = b"fLaC\0\0\0\x22" + bytes(34) + b"frames"


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5), st.binary(max_size=5))
def test_ogg(shapes: list[tuple[int, int]], damage: bytes) -> None:
    """Each link begins with the first pages of its streams; bytes between pages belong to the link before."""
    parts = [FIRST * n_streams + LATER * n_pages + damage for n_streams, n_pages in shapes]
    file = io.BytesIO(b"".join(parts))
    assert [file.getvalue()[start:end] for start, end in links(file)] == parts
    assert file.tell() == 0


def test_flac() -> None:
    """A second header begins a second part."""
    assert links(io.BytesIO(FLAC * 3)) == [(0, 48), (48, 96), (96, 144)]


def test_other_files_are_whole() -> None:
    """A file that is no chain, or empty, is one part; a truncated page begins none."""
    for data in (b"", b"RIFF" + FLAC, FLAC, FIRST + LATER, FIRST + b"OggS\0\2"):
        assert links(io.BytesIO(data)) == [(0, len(data))]
