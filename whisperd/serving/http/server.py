"""The HTTP server on listening sockets. Home of uvicorn.

Four things that uvicorn does not do by itself are added on its public hooks: the kernel's word on who is at the other
end, a deadline and a limit for the head of a request, errors in the envelope for what is no HTTP, and a drain that does
not cut off connections which were just accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import math
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from whisperd.errors import Error, RequestError
from whisperd.metrics import HttpMeter

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HttpBase

    ServerBase = uvicorn.Server
else:  # the classes below are mixed with these when uvicorn is imported
    HttpBase = ServerBase = object

BACKLOG = 2048
JUST_ACCEPTED_S = 0.5  # during a drain: time for a connection's first request to arrive
SETUP_STEPS = 3  # of the event loop, from accept to a connection that is known
CANCELLED_S = 5.0  # for tasks to end that the drain has cancelled
TURN_AWAY_S = 1.0  # for a client to send and to read while it is turned away
TURNED_AWAY_RETRY_S = 10
LINGER_S = 5.0  # at most a dozen starts in a minute, well below the StartLimitBurst= of the unit
HEAD_BYTES = 65536
OTHER = "other"  # route and method of what is no request
PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Patience of the server. ``drain_s``: how long requests in flight may take after ``stop``."""

    header_timeout_s: float = 10.0
    keep_alive_s: int = 75
    drain_s: int = 60


def turn_away(listeners: Sequence[socket.socket], error: Error, healed: Callable[[], bool]) -> int:
    """Answers 503 with the reason to everybody who waits in these sockets; returns how many that were.

    For a daemon that cannot start: unanswered connections would make systemd start it again at once, and again. Once
    somebody came it stays a while for the others, so that many clients do not cost a start each; but whoever comes
    when the cause is ``healed`` is left to the next start.
    """
    answer = _answer(error, status=HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=TURNED_AWAY_RETRY_S)
    count, patience_s, until_s = 0, 0.0, math.inf
    with selectors.DefaultSelector() as selector:
        for listener in listeners:
            listener.setblocking(False)  # a file description that is shared with systemd: it says nothing by itself
            selector.register(listener, selectors.EVENT_READ)
        while patience_s >= 0 and (ready := selector.select(patience_s)) and not (count and healed()):
            count += sum(_turn_away_one(key.fileobj, answer) for key, _ in ready)
            now_s = time.monotonic()
            until_s = min(until_s, now_s + LINGER_S)
            patience_s = until_s - now_s
    return count


def _turn_away_one(listener: Any, answer: bytes) -> int:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:  # somebody else was faster
        return 0
    with connection, contextlib.suppress(OSError):
        connection.settimeout(TURN_AWAY_S)
        connection.recv(HEAD_BYTES)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        deadline_s = time.monotonic() + TURN_AWAY_S
        while time.monotonic() < deadline_s and connection.recv(HEAD_BYTES):
            pass  # a connection that is closed with something unread in it loses the answer
    return 1


def _answer(error: Error, *, status: HTTPStatus | None = None, retry_after_s: int | None = None) -> bytes:
    """An answer that the application does not give."""
    from whisperd.serving.http.responses import error_body

    body = json.dumps(error_body(error)).encode()
    status = status or HTTPStatus(error.http_status)
    head = [
        f"HTTP/1.1 {status} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if retry_after_s is not None:
        head.append(f"retry-after: {retry_after_s}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class MalformedRequest(RequestError):
    """What came is no HTTP."""

    code = "malformed_request"

    def __init__(self) -> None:
        super().__init__("this is no HTTP/1.1 request; try: curl --unix-socket SOCKET http://whisperd/v1/models")


class HeadTooLong(RequestError):
    """The headers of a request are over the limit."""

    http_status = 431
    code = "headers_too_long"

    def __init__(self) -> None:
        super().__init__(f"the head of the request has more than {HEAD_BYTES} bytes")


class Server:
    """Serves one application until it is told to stop. No signal handlers are installed.

    Args:
        settings: its patience.
        meter: told of what never reaches the application.
    """

    def __init__(self, settings: ServerSettings | None = None, meter: HttpMeter | None = None) -> None:
        self._settings = settings or ServerSettings()
        self._meter = meter or HttpMeter()
        self._stopping = False
        self._uvicorn: uvicorn.Server | None = None

    async def serve(self, app: ASGIApp, sockets: Sequence[socket.socket]) -> None:
        """Accepts on all sockets; returns after ``stop`` when the requests in flight are answered or out of time.

        The sockets are closed then.
        """
        self._uvicorn = _mixed(_Listener, "uvicorn:Server")(_config(app, self._settings, self._meter))
        self._uvicorn.should_exit = self._stopping
        await self._uvicorn.serve(sockets=list(sockets))

    def stop(self) -> None:
        """Accept no more, finish what runs. From the event loop; may be called at any time, more than once."""
        self._stopping = True
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


def _config(app: ASGIApp, settings: ServerSettings, meter: HttpMeter) -> uvicorn.Config:
    import uvicorn

    protocol = _mixed(_Connection, "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol")
    protocol.header_timeout_s = settings.header_timeout_s
    protocol.meter = meter
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        workers=1,  # else uvicorn reads the environment
        proxy_headers=False,
        server_header=False,
        log_config=None,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.drain_s,
    )


def _mixed(mixin: type[Any], base: str) -> Any:
    """A class made of ``mixin`` and ``module:Class``, which is imported only now."""
    module, _, name = base.partition(":")
    return type(mixin.__name__, (mixin, getattr(importlib.import_module(module), name)), {})


class _Connection(HttpBase):
    """One connection. Nothing may be slow before the head of a request is complete; after it, everything may."""

    header_timeout_s: float
    meter: HttpMeter
    _deadline: asyncio.TimerHandle | None = None
    _draining = False
    _heads = 0  # that are complete
    _header_bytes = 0
    _unfinished_bytes = 0  # of a head, in which the parser may hold back a header of any length
    _in_head = True
    _refusal: RequestError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = _peer(transport.get_extra_info("socket"))
        if peer is not None:
            self.app_state = {**self.app_state, "peer": peer}
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        in_head, heads = self._in_head, self._heads
        super().data_received(data)
        in_head = in_head and self._in_head and heads == self._heads
        self._unfinished_bytes = self._unfinished_bytes + len(data) if in_head else 0
        if self._unfinished_bytes > HEAD_BYTES and self._refusal is None:
            self._refuse(HeadTooLong())

    def send_400_response(self, _msg: str) -> None:
        """Called for what the parser does not understand, and for what the methods below raise."""
        too_long = self._header_bytes > HEAD_BYTES
        self._refuse(HeadTooLong() if too_long else MalformedRequest())

    def on_message_begin(self) -> None:
        self._arm()
        self._header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        self._disarm()
        self._heads += 1
        self._in_head = False
        super().on_headers_complete()
        if self._draining and self.cycle:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:  # answered early: the rest gets no more time than a head
            self._arm()

    def shutdown(self) -> None:
        """Called for each connection when the server stops."""
        self._draining = True
        if self.cycle:
            super().shutdown()
        else:
            self.loop.call_later(JUST_ACCEPTED_S, self._close_unused)

    def _count(self, n_bytes: int) -> None:
        self._header_bytes += n_bytes
        if self._header_bytes > HEAD_BYTES:
            raise HeadTooLong

    def _refuse(self, error: RequestError) -> None:
        """Answers and listens no more; the connection is closed by the client, or after the time for a head."""
        self._refusal = error
        self.meter.observe_request(OTHER, OTHER, error.http_status, 0.0)
        self.meter.count_rejection(error.code)
        if self.cycle and not self.cycle.response_complete:  # nothing can be said in the middle of another answer
            self.transport.close()
            return
        self.transport.write(_answer(error))
        self.transport.write_eof()
        self._arm()

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if not self.cycle or self.cycle.response_complete:
            self.transport.close()

    def _close_unused(self) -> None:
        if not self.cycle:
            self.transport.close()


class _Listener(ServerBase):
    """uvicorn's server without its signal handlers, and with an end for tasks that it cancelled."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await stop_accepting(sockets or [])
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CANCELLED_S)


async def stop_accepting(listeners: Sequence[socket.socket]) -> None:
    """asyncio drops a connection that it has accepted and not yet set up when its server is closed in between."""
    loop = asyncio.get_running_loop()
    for listener in listeners:
        loop.remove_reader(listener.fileno())
    for _ in range(SETUP_STEPS):
        await asyncio.sleep(0)


def _peer(listener: socket.socket | None) -> tuple[int, int, int] | None:
    """(pid, uid, gid) of the process that connected, None for anything but a Unix socket."""
    if listener is None or listener.family != socket.AF_UNIX:
        return None
    data = listener.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    pid, uid, gid = PEER_CREDENTIALS.unpack(data)
    return pid, uid, gid
