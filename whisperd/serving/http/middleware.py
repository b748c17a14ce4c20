"""Around every request: its id, its log line, its figures, and the one place where errors become answers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection
from typing import Self
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whisperd.errors import Cancelled, Draining, Error
from whisperd.metrics import HttpMeter
from whisperd.serving.http.responses import error_body, error_response
from whisperd.serving.tasks import CANCELLED_RETRY_AFTER_S

log = logging.getLogger(__name__)

REQUEST_ID_CHARACTERS_MAX = 128
WARNING_CHARACTERS_MAX = 2000  # many clients take 8 KiB of headers at most
PROBES = frozenset({"/livez", "/readyz", "/healthz", "/health", "/metrics"})  # asked every few seconds, for ever
METHODS = frozenset({"GET", "POST"})  # others are counted as one: a client may invent them
OTHER = "other"


class RequestContext:
    """One request and its answer.

    Handlers set ``audio_s`` and ``model`` for the log, ``device`` for a header, and ``warnings`` for both.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, send_idle_s: float) -> None:
        self.request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        self.audio_s: float | None = None
        self.model: str | None = None
        self.device: Callable[[], str | None] = lambda: None
        self.warnings: tuple[str, ...] = ()
        self.streaming = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started_s = time.monotonic()
        self._received_bytes = 0
        self._status = 0
        self._complete = False
        self._error_code: str | None = None
        self._send_idle_s = send_idle_s
        self._stuck = False
        scope.setdefault("state", {})["context"] = self

    @classmethod
    def of(cls, connection: HTTPConnection) -> Self:
        """The context of a handler's request."""
        found: Self = connection.scope["state"]["context"]
        return found

    @property
    def wall_s(self) -> float:
        """Time since the request's headers were there."""
        return time.monotonic() - self._started_s

    async def receive(self) -> Message:
        """ASGI's receive; counts the body."""
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """ASGI's send; adds the headers that every answer has. Raises Cancelled when the client does not read."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(round(self.wall_s * 1000))
            if device := self.device():
                headers["x-whisperd-device"] = device
            if self.warnings:
                headers["x-whisperd-warning"] = _header_text("; ".join(self.warnings))
        else:
            self._complete = not message.get("more_body", False)
        try:
            async with asyncio.timeout(self._send_idle_s):
                await self._send(message)
        except TimeoutError as error:
            self._stuck = True
            raise Cancelled(f"the client read nothing for {self._send_idle_s:g} s") from error

    async def fail(self, error: Error) -> None:
        """Sends the error: as an answer, or in a stream that has begun as its last event."""
        self._error_code = error.code
        if self._stuck:
            return  # the client does not read; the server closes the connection
        if not self._status:
            await error_response(error)(self._scope, self.receive, self.send)
        elif self.streaming and not self._complete:
            frame = f"data: {json.dumps(error_body(error))}\n\n".encode()
            await self.send({"type": "http.response.body", "body": frame})

    def report(self) -> None:
        """Logs the request in one line, with fields for the journal; never a transcript."""
        path = quote(self._scope["path"])
        wall_ms = round(self.wall_s * 1000)
        audio = "-" if self.audio_s is None else f"{self.audio_s:.1f}"
        model = quote(self.model or "-")
        fields = {
            "WHISPERD_REQUEST_ID": self.request_id,
            "WHISPERD_PATH": path,
            "WHISPERD_STATUS": self._status,
            "WHISPERD_WALL_MS": wall_ms,
            "WHISPERD_AUDIO_S": audio,
            "WHISPERD_MODEL": model,
        }
        log.log(
            logging.DEBUG if self._scope["path"] in PROBES else logging.INFO,
            "%s %s %d in %d ms: %d bytes, %s s of audio, model %s, %s%s",
            self._scope["method"],
            path,
            self._status,
            wall_ms,
            self._received_bytes,
            audio,
            model,
            self.request_id,
            "".join(f"; warning: {one}" for one in self.warnings),
            extra={"fields": fields},
        )

    def count(self, meter: HttpMeter, routes: Collection[str]) -> None:
        """Counts the request; a path that is no route of the application counts as ``other``."""
        path, method = self._scope["path"], self._scope["method"]
        route = path if path in routes else OTHER
        meter.observe_request(route, method if method in METHODS else OTHER, self._status, self.wall_s)
        if self._error_code is not None:
            meter.count_rejection(self._error_code)


class ContextMiddleware:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, meter: HttpMeter, routes: Collection[str], send_idle_s: float) -> None:
        self._app = app
        self._send_idle_s = send_idle_s
        self._meter = meter
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(scope, receive, send, self._send_idle_s)
        try:
            await self._answer(context, scope)
        finally:
            context.report()
            context.count(self._meter, self._routes)

    async def _answer(self, context: RequestContext, scope: Scope) -> None:
        try:
            await self._app(scope, context.receive, context.send)
        except Error as error:
            await context.fail(error)
        except asyncio.CancelledError:  # the server does this to what outlives its drain, and to nothing else
            await context.fail(Draining("the daemon stopped first", retry_after_s=CANCELLED_RETRY_AFTER_S))
        except Exception:
            log.exception("%s: unexpected error", context.request_id)
            await context.fail(Error(f"internal error; the log of the daemon has more under {context.request_id}"))


def _header_text(text: str) -> str:
    """What a header may hold."""
    return "".join(one if one.isascii() and one.isprintable() else "?" for one in text)[:WARNING_CHARACTERS_MAX]


def _request_id(given: str) -> str:
    usable = 0 < len(given) <= REQUEST_ID_CHARACTERS_MAX and given.isascii() and given.isprintable()
    return given if usable else f"req_{uuid.uuid4().hex}"
