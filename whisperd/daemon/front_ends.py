"""The servers on their sockets: HTTP, and the Wyoming protocol."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence

from whisperd.config import Config
from whisperd.daemon import settings
from whisperd.metrics.prometheus import Metrics
from whisperd.serving import wyoming
from whisperd.serving.http import create_app
from whisperd.serving.http.server import Server
from whisperd.serving.interface import Service
from whisperd.serving.spool import Spool


class FrontEnds:
    """Both servers as one.

    Args:
        service: answers.
        spool: holds the uploads of both.
        config: the configuration at the boot; the options of servers need a restart.
        environ: the environment, for the key of the TCP listener.
        metrics: counts requests.
        audio_s: returns the longest audio that is accepted now.
    """

    def __init__(
        self,
        service: Service,
        spool: Spool,
        config: Config,
        environ: Mapping[str, str],
        metrics: Metrics,
        *,
        audio_s: Callable[[], float],
    ) -> None:
        self._app = create_app(service, settings.api_settings(config, environ), spool, metrics)
        self._http = Server(settings.server_settings(config), metrics)
        self._wyoming = wyoming.Listener(
            service,
            spool,
            settings.wyoming_settings(config, audio_s),
            drain_s=config.server.shutdown_timeout_s,
            meter=metrics,
        )

    async def serve(self, sockets: Sequence[socket.socket], wyoming_sockets: Sequence[socket.socket]) -> None:
        """Serves until ``stop``, and finishes what runs then."""
        await asyncio.gather(self._http.serve(self._app, sockets), self._wyoming.serve(wyoming_sockets))

    def stop(self) -> None:
        """Accepts no more."""
        self._http.stop()
        self._wyoming.stop()
