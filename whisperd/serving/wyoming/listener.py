"""Accepts connections of Wyoming clients, as many as there may be, until ``stop``."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from whisperd.metrics import WyomingMeter
from whisperd.serving.interface import Service
from whisperd.serving.spool import Spool
from whisperd.serving.tasks import CANCELLED_S, JUST_ACCEPTED_S, stop_accepting
from whisperd.serving.wyoming.messages import HEADER_BYTES
from whisperd.serving.wyoming.session import Session, Settings

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 128  # each may hold a few megabytes of events


class Listener:
    """Serves on sockets that listen already; the package's own server would remove their paths and take SIGTERM.

    Args:
        service: the daemon.
        spool: shared with the HTTP interface.
        settings: limits in time.
        drain_s: how long utterances may go on after ``stop``.
        meter: counts each utterance.
    """

    def __init__(
        self, service: Service, spool: Spool, settings: Settings, *, drain_s: float, meter: WyomingMeter
    ) -> None:
        self._service = service
        self._spool = spool
        self._settings = settings
        self._drain_s = drain_s
        self._meter = meter
        self._stopping = asyncio.Event()
        self._sessions: dict[asyncio.Task[None], Session] = {}

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Returns after ``stop``, when all utterances are answered or out of time; the sockets are closed then."""
        servers = [await asyncio.start_server(self._accept, sock=one, limit=HEADER_BYTES) for one in sockets]
        await self._stopping.wait()
        await stop_accepting(sockets)
        for server in servers:
            server.close()
        await self._drain()

    def stop(self) -> None:
        """Accepts no more. From the event loop; may be called at any time, more than once."""
        self._stopping.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= CONNECTIONS_MAX:
            log.warning("a Wyoming connection is refused: %d are open", CONNECTIONS_MAX)
            writer.transport.abort()
            return
        session = Session(reader, writer, self._service, self._spool, self._settings, self._meter)
        task = asyncio.create_task(session.run())
        self._sessions[task] = session
        task.add_done_callback(self._sessions.pop)

    async def _drain(self) -> None:
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=JUST_ACCEPTED_S)  # for a client that has just connected
        for session in self._sessions.values():
            session.stop()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=self._drain_s)
        for task in self._sessions:
            task.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=CANCELLED_S)
