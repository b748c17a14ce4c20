"""Requests to the Hub, bounded in bytes and in time. Runs in the child process; uses huggingface_hub's HTTP client.

Not the library's own calls: they read an answer of any length into memory, wait without a limit, follow links where a
file should be, and begin a download anew each time. And not xet, which cannot be resumed and is known to hang.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from whisperd.store.names import shown
from whisperd.version import VERSION

PIECE_BYTES = 1 << 20  # at most so much comes out of a decoder at once
ERROR_BYTES = 64 << 10
GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
NOT_OF_THE_COPY = frozenset({"content-encoding", "content-length", "transfer-encoding"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where files are, and how long to wait.

    Args:
        endpoint: address of the Hub without a slash at the end.
        repo: ``owner/name``.
        token: the secret, or None.
        timeout_s: how long nothing may come.
    """

    endpoint: str
    repo: str
    token: str | None
    timeout_s: float

    def revision_url(self, revision: str) -> str:
        """Answers with the commit, and the size and hash of each of its files."""
        return f"{self.endpoint}/api/models/{self.repo}/revision/{quote(revision, safe='')}?blobs=true"

    def file_url(self, commit: str, path: str) -> str:
        """Answers with the bytes of a file, or leads there."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, path, revision=commit, endpoint=self.endpoint)

    def get(self, url: str, limit_bytes: int) -> bytes:
        """A whole answer; raises ConnectionError if it is longer than the limit, and TimeoutError if it is slow."""
        got = bytearray()
        deadline_s = time.monotonic() + self.timeout_s
        with self._opened(url, {"Accept-Encoding": "gzip"}) as response:
            for piece in _pieces(response):
                got += piece
                if len(got) > limit_bytes:
                    raise ConnectionError(f"the answer is longer than {limit_bytes:,} bytes: this is no Hub")
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"the answer was not there after {self.timeout_s:g} s: timed out")
        return bytes(got)

    def get_head(self, url: str, n_bytes: int) -> bytes:
        """The first bytes of a file."""
        got = b""
        with self._opened(url, {"Accept-Encoding": "identity", "Range": f"bytes=0-{n_bytes - 1}"}) as response:
            for piece in _pieces(response):
                got += piece
                if len(got) >= n_bytes:
                    break
        return got[:n_bytes]

    def append_rest(self, url: str, part: Part, size_bytes: int) -> None:
        """Appends what a part lacks. Each piece is written as it comes; raises when fewer or more bytes come."""
        have_bytes = part.size_bytes
        headers = {"Accept-Encoding": "identity"}
        with self._opened(url, headers | ({"Range": f"bytes={have_bytes}-"} if have_bytes else {})) as response:
            if not _goes_on_at(response, have_bytes):
                part.truncate()
                have_bytes = 0
            for piece in _pieces(response):
                have_bytes += len(piece)
                if have_bytes > size_bytes:
                    raise OSError(f"the file should be of size {size_bytes} but has size {have_bytes} or more")
                part.append(piece)
        if have_bytes != size_bytes:
            raise OSError(f"the file should be of size {size_bytes} but has size {have_bytes}")

    @contextmanager
    def _opened(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """An answer whose body is still to be read; errors of the Hub are raised as huggingface_hub names them."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        sent = build_hf_headers(token=self.token or False, library_name="whisperd", library_version=VERSION)
        with get_session().stream("GET", url, headers=sent | headers, timeout=self.timeout_s) as response:
            if response.status_code >= 400:
                hf_raise_for_status(_with_short_body(response))
            yield response


class Part:
    """An open file that grows: a regular file with one name, never one that a link leads to.

    Raises OSError if something else is in its place.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._handle = os.open(path, flags, 0o666)
        found = os.fstat(self._handle)
        if not _is_part(found):
            os.close(self._handle)
            raise FileExistsError(errno.EEXIST, "Not a regular file", str(path))

    @property
    def size_bytes(self) -> int:
        """How much is there."""
        return os.fstat(self._handle).st_size

    def append(self, data: bytes) -> None:
        """Writes at the end."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def truncate(self) -> None:
        """Begins anew."""
        os.truncate(self._handle, 0)

    def close(self) -> None:
        """Ends the writing."""
        os.close(self._handle)


def is_part(path: Path) -> bool:
    """True for a regular file with one name: whoever writes to it changes nothing else."""
    try:
        return _is_part(path.lstat())
    except OSError:
        return False


def _is_part(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def part_bytes(path: Path) -> int:
    """The size of a part; 0 where there is none."""
    return path.lstat().st_size if is_part(path) else 0


def _goes_on_at(response: Any, have_bytes: int) -> bool:
    """True if the body of the answer begins where the part ends; a server may ignore what was asked for."""
    if have_bytes == 0:
        return True
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or found is None:
        return False
    if int(found[1]) != have_bytes or _encoding(response) != "identity":
        raise OSError(f"asked for the bytes from {have_bytes} on, got {shown(found[0])} ({_encoding(response)})")
    return True


def _pieces(response: Any) -> Iterator[bytes]:
    """The body as it comes, decoded, in pieces that are never large."""
    if _encoding(response) == "identity":
        yield from response.iter_raw()
        return
    decoder = zlib.decompressobj(GZIP_OR_ZLIB)
    for raw in response.iter_raw():
        while True:
            try:
                piece = decoder.decompress(raw, PIECE_BYTES)
            except zlib.error as error:
                raise ConnectionError(f"the answer cannot be decoded: {error}") from error
            raw = decoder.unconsumed_tail  # noqa: PLW2901 - what the limit has left
            yield piece
            if not raw and len(piece) < PIECE_BYTES:
                break


def _encoding(response: Any) -> str:
    """``identity`` or ``gzip``; raises ConnectionError for what was not asked for."""
    name = response.headers.get("Content-Encoding", "identity").strip().lower() or "identity"
    if name not in ("identity", "gzip"):
        raise ConnectionError(f"the answer has the encoding {shown(name)}, which was not asked for")
    return str(name)


def _with_short_body(response: Any) -> Any:
    """An answer that says why not, with the beginning of its body: the rest of it says no more."""
    body = b""
    for piece in _pieces(response):
        body += piece
        if len(body) > ERROR_BYTES:
            break
    headers = {name: value for name, value in response.headers.items() if name.lower() not in NOT_OF_THE_COPY}
    copy = type(response)(response.status_code, headers=headers, content=body[:ERROR_BYTES], request=response.request)
    copy.history = response.history
    return copy
