"""The HTTP server on listening sockets, and the answer of a daemon that cannot start."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from whisperd.errors import Error
from whisperd.metrics import HttpMeter
from whisperd.serving.interface import ServerSettings

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

TURN_AWAY_S = 1.0  # for a client to send and to read while it is turned away
TURNED_AWAY_RETRY_S = 10
LINGER_S = 5.0  # at most a dozen starts in a minute, well below the StartLimitBurst= of the unit
RECEIVED_BYTES = 65536


class Server:
    """Serves one application until ``stop``. No signal handlers are installed.

    Args:
        settings: limits in time.
        meter: counts what never reaches the application.
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
        from whisperd.serving.http.protocol import DrainingServer, ServerConfig

        self._uvicorn = DrainingServer(ServerConfig(app, self._settings, self._meter))
        self._uvicorn.should_exit = self._stopping
        await self._uvicorn.serve(sockets=list(sockets))

    def stop(self) -> None:
        """Accepts no more and finishes what runs. From the event loop; may be called at any time, more than once."""
        self._stopping = True
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


def turn_away(listeners: Sequence[socket.socket], error: Error, healed: Callable[[], bool]) -> int:
    """Answers 503 with the reason to all clients that wait in these sockets; returns how many they were.

    For a daemon that cannot start: unanswered connections would make systemd start it again at once, and again. Once
    somebody came it stays a while for the others, so that many clients do not cost a start each; but whoever comes
    when the cause is ``healed`` is left to the next start.
    """
    from whisperd.serving.http.responses import error_bytes

    answer = error_bytes(error, status=HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=TURNED_AWAY_RETRY_S)
    count, patience_s, until_s = 0, 0.0, math.inf
    with selectors.DefaultSelector() as selector:
        for listener in listeners:
            listener.setblocking(False)  # a file description that is shared with systemd: its mode is not known
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
    except BlockingIOError:  # another process accepted it
        return 0
    with connection, contextlib.suppress(OSError):
        connection.settimeout(TURN_AWAY_S)
        connection.recv(RECEIVED_BYTES)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        deadline_s = time.monotonic() + TURN_AWAY_S
        while time.monotonic() < deadline_s and connection.recv(RECEIVED_BYTES):
            pass  # a connection that is closed with something unread in it loses the answer
    return 1
