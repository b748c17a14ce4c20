"""uvicorn's connection and server with what they lack; imported late, when the daemon serves. Home of uvicorn.

Added on its public hooks: the peer's credentials from the kernel, a deadline and a limit for the head of a
request, errors in the envelope for what is no HTTP, answers to offers of another protocol and to half-closed
connections, and a drain that does not cut off connections which were just accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from whisperd.errors import RequestError
from whisperd.metrics import HttpMeter
from whisperd.serving.http.responses import error_bytes
from whisperd.serving.interface import ServerSettings
from whisperd.serving.sockets import BACKLOG
from whisperd.serving.tasks import CANCELLED_S, JUST_ACCEPTED_S, stop_accepting

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn.server import ServerState

HEAD_BYTES = 65536
HALF_CLOSED_S = 1.0  # between two looks at whether a half-closed client is still there
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
OFFER_HEADERS = frozenset({b"upgrade", b"http2-settings"})
OTHER = "other"  # route and method of what is no request
PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


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


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration, all of it set here, and what ``Connection`` needs besides.

    Args:
        app: the application.
        settings: limits in time.
        meter: counts what never reaches the application.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, meter: HttpMeter) -> None:
        self.header_timeout_s = settings.header_timeout_s
        self.meter = meter
        super().__init__(
            app,
            http=Connection,
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


class PlainParser:
    """Parses HTTP/1.1 and ignores offers of another protocol, as RFC 9110, section 7.8, lets a server do.

    httptools stops behind a head with an ``Upgrade`` field and drops the body. Such a head is parsed a second time,
    without the offer, and the body after it. Java's HttpClient and ``curl --http2`` send one with every request.

    Args:
        connection: gets the parser's callbacks; ``on_headers_complete`` and ``on_message_complete`` of the first pass
            too, where ``is_offer`` is true.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._parser = _new_parser(connection)

    def feed_data(self, data: bytes) -> None:
        """Parses; raises HttpParserError."""
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._connection.head_without_offer() + data[offer.args[0] :]
                self._parser = _new_parser(self._connection)
            else:
                return

    @property
    def is_offer(self) -> bool:
        """Whether the head that was just parsed offers another protocol."""
        return self._parser.should_upgrade()

    def should_upgrade(self) -> bool:
        """Whether uvicorn should change the protocol: never."""
        return False

    def should_keep_alive(self) -> bool:
        """Whether the connection may serve another request."""
        return self._parser.should_keep_alive()

    def get_http_version(self) -> str:
        """As in ``1.1``."""
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        """As in ``POST``."""
        return self._parser.get_method()


def _new_parser(connection: Connection) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
    return parser


class Connection(HttpToolsProtocol):
    """One connection. Nothing may be slow before the head of a request is complete; after it, everything may."""

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser: PlainParser = PlainParser(self)  # type: ignore[assignment]
        self._header_timeout_s = config.header_timeout_s
        self._meter = config.meter
        self._deadline: asyncio.TimerHandle | None = None
        self._draining = False
        self._n_heads = 0  # that are complete
        self._header_bytes = 0
        self._unfinished_bytes = 0  # of a head, in which the parser may hold back a header of any length
        self._in_head = True
        self._refusal: RequestError | None = None
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = _peer(transport.get_extra_info("socket"))
        if peer is not None:
            self.app_state = {**self.app_state, "peer": peer}
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: true keeps the connection open for the answer to what it has sent."""
        cycle = self.cycle
        if not cycle or cycle.more_body or cycle.response_complete or self._is_gone():
            return False
        cycle.keep_alive = False
        self._look = self.loop.call_later(HALF_CLOSED_S, self._look_for_client)
        return True

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        in_head, n_heads = self._in_head, self._n_heads
        super().data_received(data)
        in_head = in_head and self._in_head and n_heads == self._n_heads
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
        if self.parser.is_offer:
            return
        self._in_head = True
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise MalformedRequest
        if self.parser.is_offer:
            return
        self._disarm()
        self._n_heads += 1
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

    def head_without_offer(self) -> bytes:
        """The head that was parsed last, without what offers another protocol."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                lines.append(b"connection: " + _without_offer(value))
            elif name not in OFFER_HEADERS:
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _look_for_client(self) -> None:
        """Ends the work for a half-closed client that has gone.

        A peer that closed its end of a TCP connection looks like one that only sends no more, until something is sent
        to it. 100 (Continue) is what every client of HTTP/1.1 skips.
        """
        if self._is_gone():
            self.transport.abort()
            return
        waiting = not self.pipeline and not self.cycle.response_started
        if self.client is not None and waiting and self.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
        self._look = self.loop.call_later(HALF_CLOSED_S, self._look_for_client)

    def _is_gone(self) -> bool:
        """Whether the peer has closed both directions, as far as the kernel knows."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)  # POLLHUP and POLLERR come unasked
        return bool(poll.poll(0))

    def _count(self, n_bytes: int) -> None:
        self._header_bytes += n_bytes
        if self._header_bytes > HEAD_BYTES:
            raise HeadTooLong

    def _refuse(self, error: RequestError) -> None:
        """Answers and reads no more; the connection is closed by the client, or after the time for a head."""
        self._refusal = error
        self._meter.observe_request(OTHER, OTHER, error.http_status, 0.0)
        self._meter.count_rejection(error.code)
        if self.cycle and not self.cycle.response_complete:  # another answer is being sent
            self.transport.close()
            return
        self.transport.write(error_bytes(error))
        self.transport.write_eof()
        self._arm()

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._header_timeout_s, self._expire)

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


def _without_offer(connection: bytes) -> bytes:
    tokens = [token.strip() for token in connection.split(b",")]
    return b", ".join(token for token in tokens if token.lower() not in OFFER_HEADERS)


class DrainingServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, and with an end for tasks that it cancelled."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await stop_accepting(sockets or [])
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CANCELLED_S)


def _peer(listener: socket.socket | None) -> tuple[int, int, int] | None:
    """(pid, uid, gid) of the process that connected, None for anything but a Unix socket."""
    if listener is None or listener.family != socket.AF_UNIX:
        return None
    data = listener.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    pid, uid, gid = PEER_CREDENTIALS.unpack(data)
    return pid, uid, gid
