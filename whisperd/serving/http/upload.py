"""A multipart form with one file, taken in as it arrives.

The parts may come in any order: Python's SDK sends the file last, Node's sends it first and without a length. So the
file goes to the spool while nothing else is known yet, and every limit holds while reading.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from whisperd.errors import Cancelled, RequestError
from whisperd.serving.spool import Spool, SpoolFile
from whisperd.serving.tasks import Pace, SlowWatch, UploadStalled

FIELDS_MAX = 64
FIELD_BYTES_MAX = 64 * 1024
FORM_BYTES = FIELDS_MAX * FIELD_BYTES_MAX  # what a body may hold besides its file
EXAMPLE = "curl --unix-socket SOCKET http://whisperd/v1/audio/transcriptions -F file=@talk.mp3"


@dataclass(slots=True, kw_only=True)
class Upload:
    """A form that has arrived in full. The caller closes ``file``."""

    file: SpoolFile
    filename: str
    fields: tuple[tuple[str, str], ...]


@dataclass(slots=True, kw_only=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """Collects the parts that the parser finds. The limits are checked here, so that no byte over them is kept."""

    def __init__(self, spool: Spool, resolve: Callable[[str], object]) -> None:
        self._spool = spool
        self._resolve = resolve
        self._part = _Part()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self.fields: list[tuple[str, str]] = []
        self.file: SpoolFile | None = None
        self.filename = ""
        self.complete = False

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser that calls the methods below."""
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_data,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def upload(self) -> Upload:
        """The form; raises RequestError when it is not whole or holds no file."""
        if not self.complete:
            raise RequestError("the multipart body ends before its closing boundary; send the request again")
        if self.file is None:
            raise MissingParameter("the field 'file' is missing; send the audio as a file part", param="file")
        if not self.file.size_bytes:
            raise RequestError("the file is empty", param="file")
        return Upload(file=self.file, filename=self.filename, fields=tuple(self.fields))

    def _begin(self) -> None:
        self._part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._part.headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get(b"content-disposition"))
        if b"name" not in options:
            raise RequestError("a part of the form has no name in its content-disposition header")
        part.name = options[b"name"].decode(errors="replace")
        part.filename = options.get(b"filename", b"").decode(errors="replace")
        part.is_file = part.name == "file"
        if part.is_file:
            self._open(part)
        elif b"filename" in options:
            raise RequestError(
                f"{part.name[:80]!r} is sent as a file; the audio belongs in 'file'", param=part.name[:80]
            )
        elif len(self.fields) == FIELDS_MAX:
            raise RequestError(f"the form has more than {FIELDS_MAX} fields")

    def _open(self, part: _Part) -> None:
        if self.file is not None:
            raise RequestError("the form has two files; send one request for each", param="file")
        for name, value in self.fields:  # those that came first: here the rest of the upload can still be saved
            if name == "model" and value.strip():
                self._resolve(value.strip())
        self.file = self._spool.create()
        self.filename = part.filename or "audio"

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.is_file and self.file is not None:
            self.file.write(memoryview(data)[start:end])
            return
        part.value += data[start:end]
        if len(part.value) > FIELD_BYTES_MAX:
            raise RequestError(f"the field is longer than {FIELD_BYTES_MAX} bytes", param=part.name[:80])

    def _end(self) -> None:
        part = self._part
        if part.is_file:
            return
        try:
            self.fields.append((part.name, part.value.decode()))
        except UnicodeDecodeError as error:
            raise RequestError("the field is not UTF-8", param=part.name[:80]) from error

    def _finish(self) -> None:
        self.complete = True


class MissingParameter(RequestError):
    """A field that every request needs is not there."""

    code = "missing_required_parameter"


async def receive_upload(
    request: Request, spool: Spool, pace: Pace, resolve: Callable[[str], object], on_slow: Callable[[], None]
) -> Upload:
    """Reads the whole body; raises RequestError, FileTooLarge, SpoolFull, or Cancelled when the client went away.

    ``on_slow`` is called when the body comes so slowly that the request should yield its place.

    A length over the limits is refused before the body, and an unknown model before the file where its name comes
    first: ``resolve`` raises for one that is not served. Whatever is raised, the spool is as it was before.
    """
    boundary = _boundary(request.headers.get("content-type", ""))
    _refuse_long(request.headers.get("content-length", ""), spool)
    form = _Form(spool, resolve)
    try:
        with _translated(pace), SlowWatch(pace, on_slow) as watch:
            await _feed(request.stream(), form.parser(boundary).write, pace, watch)
        return form.upload()
    except BaseException:
        form.close()
        raise


async def _feed(chunks: AsyncIterator[bytes], write: Callable[[bytes], int], pace: Pace, watch: SlowWatch) -> None:
    started_s = time.monotonic()
    while True:
        async with asyncio.timeout(pace.idle_s):
            chunk = await anext(chunks, None)
        if chunk is None:
            return
        watch.n_bytes += len(chunk)
        if not pace.allows(watch.n_bytes, time.monotonic() - started_s):
            raise UploadStalled(
                f"the upload is slower than {pace.bytes_per_s:g} bytes a second; send the request again",
            )
        if chunk:
            write(chunk)


@contextmanager
def _translated(pace: Pace) -> Iterator[None]:
    try:
        yield
    except ClientDisconnect as error:
        raise Cancelled("the client went away in the middle of its upload") from error
    except TimeoutError as error:
        raise UploadStalled(f"no data came for {pace.idle_s:g} s; send the request again") from error
    except FormParserError as error:
        raise RequestError(f"the multipart body cannot be read: {error}") from error


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        shown = content_type[:80] or "none"
        raise RequestError(f"expected content-type multipart/form-data with a boundary, got {shown!r}; try: {EXAMPLE}")
    return options[b"boundary"]


def _refuse_long(content_length: str, spool: Spool) -> None:
    if content_length.isdecimal() and int(content_length) > FORM_BYTES:
        spool.refuse_announced(int(content_length) - FORM_BYTES)
