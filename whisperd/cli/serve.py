"""``whisperd serve``: the daemon itself."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisperd.cli.common import config_options, read_config
from whisperd.errors import ConfigError, Error

if TYPE_CHECKING:
    import socket

    from whisperd.config import Config
    from whisperd.notify import Notifier

log = logging.getLogger(__name__)


@click.command()
@config_options
def serve(config_file: Path | None, overrides: Sequence[str]) -> None:
    """Run the daemon in the foreground.

    SIGHUP reads the configuration again, SIGTERM finishes what runs and stops.
    """
    import faulthandler

    from whisperd.notify import Notifier
    from whisperd.server import inherited_sockets

    faulthandler.enable()  # the watchdog's SIGABRT shows where every thread was
    notifier = Notifier(os.environ)
    inherited: Sequence[socket.socket] = ()
    try:
        inherited = inherited_sockets(os.environ)
        _run(config_file, overrides, notifier, inherited)
    except Error as error:
        _say_why(error, notifier)
        _turn_away(error, inherited, lambda: read_config(config_file, overrides))
        raise
    finally:
        notifier.close()


def _run(
    config_file: Path | None, overrides: Sequence[str], notifier: Notifier, inherited: Sequence[socket.socket]
) -> None:
    import asyncio

    loaded = read_config(config_file, overrides)

    from whisperd.daemon.lifecycle import Daemon
    from whisperd.daemon.logs import configure

    configure(loaded.config.log_level, loaded.config.log.format, os.environ)
    log.info("%s", loaded.header)
    for warning in loaded.warnings:
        log.warning("%s", warning)
    sockets = [*(inherited or [_own_socket(loaded.config)]), *_tcp_sockets(loaded.config)]

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


def _own_socket(config: Config) -> socket.socket:
    from whisperd.config import socket_path
    from whisperd.server import bind_unix

    path = socket_path(config, os.environ, uid=os.getuid())
    log.info("listening at %s", path)
    return bind_unix(path, mode=int(config.server.socket_mode, 8), group=config.server.socket_group)


def _tcp_sockets(config: Config) -> Sequence[socket.socket]:
    """Where it is asked for."""
    if not config.server.tcp:
        return ()
    from whisperd.tcp import bind_tcp

    listener = bind_tcp(config.server.tcp)
    log.info("listening at http://%s", config.server.tcp)
    return (listener,)


def _say_why(error: Error, notifier: Notifier) -> None:
    notifier.status(str(error))
    if isinstance(error, ConfigError):
        notifier.errno(errno.EINVAL)


def _turn_away(error: Error, inherited: Sequence[socket.socket], read: Callable[[], object]) -> None:
    """Tells those who wait in a socket that the daemon has not served."""
    waiting = [listener for listener in inherited if listener.fileno() >= 0]
    if not waiting:
        return
    from whisperd.server import turn_away

    def healed() -> bool:
        try:
            read()
        except ConfigError:
            return False
        return isinstance(error, ConfigError)

    turn_away(waiting, error, healed)
