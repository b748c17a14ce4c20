"""Client of the daemon: HTTP over its Unix socket, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from whisperd.errors import DaemonUnreachable, Error, RemoteError, RequestError, SocketPermissionError

if TYPE_CHECKING:
    from whisperd.serving.schema import Model, Models, Reload, Report, Status

Json = dict[str, Any]
OnEvent = Callable[[str, Json], None]

HOST = "whisperd"  # HTTP requires a Host header; over a Unix socket it is not checked
CHUNK_BYTES = 256 * 1024
TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"


class Client:
    """Sends requests to the daemon at one socket; each call opens a connection.

    Args:
        socket_path: the socket of the daemon.
        timeout_s: the longest silence of the daemon; None waits for ever. In a stream the daemon sends an event or a
            comment every few seconds.

    Every call raises DaemonUnreachable, SocketPermissionError, or RemoteError with the message of the daemon.
    """

    def __init__(self, socket_path: Path, timeout_s: float | None = None) -> None:
        self._path = socket_path
        self._timeout_s = timeout_s
        self._open: set[_Connection] = set()

    def abort(self) -> None:
        """Closes all connections, from another thread: the daemon cancels their requests, and the calls raise."""
        for connection in tuple(self._open):
            connection.cut()

    def status(self) -> Status:
        """The status of the daemon."""
        return cast("Status", self._call("GET", "/v1/whisperd/status"))

    def models(self) -> list[Model]:
        """The declared models, the default one first."""
        return cast("Models", self._call("GET", "/v1/models"))["data"]

    def ready(self) -> bool:
        """True if the daemon serves requests now; False while it loads."""
        try:
            self._call("GET", "/readyz")
        except RemoteError as error:
            if error.status != http.client.SERVICE_UNAVAILABLE:
                raise
            return False
        return True

    def reload(self) -> Reload:
        """Reloads the configuration of the daemon; returns what changed."""
        return cast("Reload", self._call("POST", "/v1/whisperd/reload"))

    def reconcile(self, order: Mapping[str, Any], on_event: OnEvent) -> Report:
        """Reconciles the cache of the daemon; returns its report.

        Args:
            order: ``check``, ``force``, ``verify``, ``update``, ``prune``, ``models``.
            on_event: called with the events ``whisperd.store.plan`` and ``whisperd.progress``.
        """
        with self._connected() as connection:
            with self._translated():
                connection.request("POST", "/v1/whisperd/reconcile", json.dumps(order))
                response = _response(connection)
            return cast("Report", self._listen(response, on_event, last="whisperd.report"))

    def transcribe(
        self,
        file: BinaryIO,
        *,
        filename: str,
        fields: Mapping[str, str],
        on_event: OnEvent,
        translate: bool = False,
    ) -> Json:
        """Transcribes one file; returns its ``verbose_json`` with ``x_whisperd``.

        Args:
            file: audio in any container, from its position on; a pipe is sent while it is read.
            filename: name of the file in messages.
            fields: form fields as in the HTTP API.
            on_event: called with the type and the data of every event.
            translate: to English.
        """
        form = _Form(file, filename, {**fields, "stream": "true"})
        with self._connected() as connection:
            with self._translated():
                form.send(connection, TRANSLATIONS if translate else TRANSCRIPTIONS)
                response = _response(connection)
            return self._listen(response, on_event, last="whisperd.transcript")

    def _call(self, method: str, path: str) -> Json:
        with self._connected() as connection, self._translated():
            connection.request(method, path)
            return _decoded(_response(connection).read())

    @contextmanager
    def _connected(self) -> Iterator[_Connection]:
        with closing(_Connection(self._path, self._timeout_s)) as connection:
            connection.connect()
            self._open.add(connection)
            try:
                yield connection
            finally:
                self._open.discard(connection)

    def _listen(self, response: http.client.HTTPResponse, on_event: OnEvent, *, last: str) -> Json:
        found: Json | None = None
        while (event := self._next(response)) is not None:
            if "error" in event:
                raise _remote_error(response.status, json.dumps(event).encode())
            kind = event.pop("type")
            on_event(kind, event)  # outside of _translated: its errors are not those of the connection
            if kind == last:
                found = event
        if found is None:
            raise self._lost()
        return found

    def _next(self, response: http.client.HTTPResponse) -> Json | None:
        with self._translated():
            return _next_event(response)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translates errors of the connection to DaemonUnreachable."""
        try:
            yield
        except TimeoutError as error:
            raise DaemonUnreachable(
                f"the daemon at {self._path} sent nothing for {self._timeout_s:g} s; see: journalctl -u whisperd"
            ) from error
        except (http.client.HTTPException, ConnectionError) as error:
            raise self._lost() from error

    def _lost(self) -> DaemonUnreachable:
        return DaemonUnreachable(
            f"the daemon at {self._path} closed the connection before it had answered; "
            "it was stopped or crashed, see: journalctl -u whisperd"
        )


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__(HOST, timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(os.fspath(self._path))
        except PermissionError as error:
            raise SocketPermissionError(_explain_permission(self._path)) from error
        except OSError as error:
            raise DaemonUnreachable(
                f"no daemon answers at {self._path} ({error.strerror or error}); "
                "start one: systemctl start whisperd, or: whisperd serve"
            ) from error

    def cut(self) -> None:
        """Ends the connection while another thread reads from it."""
        with suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)


def _explain_permission(path: Path) -> str:
    """The message for a socket that this user may not use, with what to do."""
    import grp

    try:
        found = path.stat()
        group = grp.getgrgid(found.st_gid).gr_name
    except (OSError, KeyError):  # a directory that cannot be entered, a group without a name
        return f"permission denied: {path}; ask whoever runs the daemon for access"
    if found.st_gid == 0 or not found.st_mode & stat.S_IWGRP:  # nobody should join that one
        return (
            f"permission denied: {path} is for uid {found.st_uid} alone; become that user, or have a group named in "
            "server.socket_group (and join it)"
        )
    return (
        f"permission denied: {path} is for the group {group}; join the group {group} "
        f"(as root: usermod -aG {group} USER) and log in again"
    )


class _Form:
    """A multipart form whose file is sent while it is read."""

    def __init__(self, file: BinaryIO, filename: str, fields: Mapping[str, str]) -> None:
        self._boundary = os.urandom(16).hex()
        parts = [self._head(f'name="{_quoted(name)}"') + value.encode() + b"\r\n" for name, value in fields.items()]
        self._before = b"".join(parts) + self._head(f'name="file"; filename="{_quoted(filename)}"')
        self._after = f"\r\n--{self._boundary}--\r\n".encode()
        self._file = file
        self._filename = filename
        self._file_bytes = _remaining_bytes(file)

    def send(self, connection: http.client.HTTPConnection, path: str) -> None:
        """Sends the form, until its end or until the daemon answers, which it may do at any time."""
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", f"multipart/form-data; boundary={self._boundary}")
        connection.putheader("X-Whisperd-Events", "1")
        chunked = self._file_bytes is None
        if self._file_bytes is None:
            connection.putheader("Transfer-Encoding", "chunked")
        else:
            connection.putheader("Content-Length", str(len(self._before) + self._file_bytes + len(self._after)))
        try:
            connection.endheaders()
            for piece in self._pieces():
                if _answered(connection):
                    return
                connection.send(_chunk(piece) if chunked else piece)
            if chunked:
                connection.send(_chunk(b""))
        except (BrokenPipeError, ConnectionResetError):
            return  # an answer that was sent before the connection was closed is still there to be read

    def _head(self, disposition: str) -> bytes:
        return f"--{self._boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()

    def _pieces(self) -> Iterator[bytes]:
        yield self._before
        if self._file_bytes is None:
            read = getattr(self._file, "read1", self._file.read)  # of a pipe, what is there now
            yield from iter(lambda: read(CHUNK_BYTES), b"")
        else:
            yield from self._exactly(self._file_bytes)
        yield self._after

    def _exactly(self, n_bytes: int) -> Iterator[bytes]:
        """Yields the announced number of bytes of a file that may have grown; raises RequestError if it has shrunk."""
        while n_bytes:
            piece = self._file.read(min(CHUNK_BYTES, n_bytes))
            if not piece:
                raise RequestError(f"{self._filename} became shorter while it was being sent", param="file")
            n_bytes -= len(piece)
            yield piece


def _remaining_bytes(file: BinaryIO) -> int | None:
    if not file.seekable():
        return None
    start = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(start)
    return end - start


def _answered(connection: http.client.HTTPConnection) -> bool:
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _quoted(text: str) -> str:
    """Quotes a name as browsers do, so that it cannot end its header."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _response(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise _remote_error(response.status, response.read(), response.headers.get("retry-after-ms"))
    return response


def _next_event(response: http.client.HTTPResponse) -> Json | None:
    """Reads the data of the next event, one line; None at ``[DONE]``."""
    for line in response:
        name, _, value = line.rstrip(b"\r\n").partition(b": ")
        if name == b"data":
            return None if value == b"[DONE]" else _decoded(value)
    raise http.client.IncompleteRead(b"")


def _decoded(body: bytes) -> Json:
    try:
        decoded = json.loads(body)
    except ValueError as error:
        raise http.client.HTTPException("not JSON") from error
    if not isinstance(decoded, dict):
        raise http.client.HTTPException("not an object")
    return decoded


def _remote_error(status: int, body: bytes, retry_after_ms: str | None = None) -> RemoteError:
    retry_after_s = int(retry_after_ms) / 1000 if retry_after_ms and retry_after_ms.isdecimal() else None
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, TypeError, KeyError):
        message, code = f"the answer was HTTP {status}: {body[:200].decode(errors='replace')}", ""
    return RemoteError(
        message, status=status, code=code, exit_code=_exit_code(status, code), retry_after_s=retry_after_s
    )


def _exit_code(status: int, code: str) -> int:
    """The exit code of the error class with this code."""
    known = {kind.code: kind.exit_code for kind in _kinds(Error)}
    by_status = 2 if http.client.BAD_REQUEST <= status < http.client.INTERNAL_SERVER_ERROR else 1
    return known.get(code, by_status)


def _kinds(kind: type[Error]) -> Iterator[type[Error]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)
