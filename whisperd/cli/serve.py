"""``whisperd serve``: the daemon itself."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisperd.cli.common import config_options, read_config
from whisperd.errors import Error

if TYPE_CHECKING:
    import socket

    from whisperd.config import Config, Loaded
    from whisperd.notify import Notifier

log = logging.getLogger(__name__)


@click.command()
@config_options
def serve(config_file: Path | None, overrides: Sequence[str]) -> None:
    """Run the daemon in the foreground.

    SIGHUP reads the configuration again, SIGTERM finishes what runs and stops.
    """
    from whisperd.notify import Notifier

    notifier = Notifier(os.environ)
    try:
        loaded = read_config(config_file, overrides)
        _run(loaded, config_file, overrides, notifier)
    except Error as error:
        notifier.status(str(error))
        raise
    finally:
        notifier.close()


def _run(loaded: Loaded, config_file: Path | None, overrides: Sequence[str], notifier: Notifier) -> None:
    import asyncio

    from whisperd.daemon.lifecycle import Daemon
    from whisperd.daemon.logs import configure

    configure(loaded.config.log_level, loaded.config.log.format, os.environ)
    log.info("%s", loaded.header)
    for warning in loaded.warnings:
        log.warning("%s", warning)
    sockets = _sockets(loaded.config, os.environ)

    async def run() -> None:
        daemon = Daemon(
            loaded,
            read_config=lambda: read_config(config_file, overrides),
            environ=os.environ,
            notifier=notifier,
            sockets=sockets,
        )
        await daemon.run()

    asyncio.run(run())


def _sockets(config: Config, environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Those that systemd passes, else one of our own; and TCP where it is asked for."""
    from whisperd.config import socket_path
    from whisperd.server import bind_unix, inherited_sockets
    from whisperd.tcp import bind_tcp

    sockets = inherited_sockets(environ)
    if not sockets:
        path = socket_path(config, environ, uid=os.getuid())
        log.info("listening at %s", path)
        sockets = [bind_unix(path, mode=int(config.server.socket_mode, 8), group=config.server.socket_group)]
    if config.server.tcp:
        sockets.append(bind_tcp(config.server.tcp))
        log.info("listening at http://%s", config.server.tcp)
    return sockets
