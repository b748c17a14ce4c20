"""``whisperd serve``: runs the daemon."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisperd.cli.options import config_options, read_checked_config
from whisperd.errors import ConfigError, Error

if TYPE_CHECKING:
    import socket

    from whisperd.config import Config
    from whisperd.notify import Notifier
    from whisperd.serving.sockets import Inherited

WYOMING = "wyoming"  # FileDescriptorName= of its socket unit
FOR_WYOMING = " for the Wyoming protocol"
UNIX = "unix:"

log = logging.getLogger(__name__)


@click.command()
@config_options
def serve(config_file: Path | None, overrides: Sequence[str]) -> None:
    """Run the daemon in the foreground.

    SIGHUP reads the configuration again, SIGTERM finishes what runs and stops.
    """
    import faulthandler

    from whisperd.notify import Notifier
    from whisperd.serving.sockets import inherited_sockets

    faulthandler.enable()  # the watchdog's SIGABRT shows where every thread was
    notifier = Notifier(os.environ)
    inherited: Sequence[Inherited] = ()
    try:
        inherited = inherited_sockets(os.environ)
        _run(config_file, overrides, notifier, inherited)
    except Error as error:
        _notify(error, notifier)
        _turn_away(error, inherited, lambda: read_checked_config(config_file, overrides))
        raise
    finally:
        notifier.close()


def _run(
    config_file: Path | None, overrides: Sequence[str], notifier: Notifier, inherited: Sequence[Inherited]
) -> None:
    import asyncio

    loaded = read_checked_config(config_file, overrides)

    from whisperd.config import hide, known_secrets
    from whisperd.daemon.daemon import Daemon
    from whisperd.logs import configure

    configure(
        loaded.config.log_level,
        loaded.config.log.format,
        os.environ,
        hide=partial(hide, secrets=known_secrets(loaded.config, os.environ)),
    )
    log.info("%s", loaded.header)
    for warning in loaded.warnings:
        log.warning("%s", warning)
    passed = [one.socket for one in inherited if one.name != WYOMING]
    sockets = [*(passed or [_own_socket(loaded.config)]), *_tcp_sockets(loaded.config)]
    wyoming_sockets = _wyoming_sockets(loaded.config, [one.socket for one in inherited if one.name == WYOMING])

    async def run() -> None:
        daemon = Daemon(
            loaded,
            read_config=lambda: read_checked_config(config_file, overrides),
            environ=os.environ,
            notifier=notifier,
            sockets=sockets,
            wyoming_sockets=wyoming_sockets,
        )
        await daemon.run()

    asyncio.run(run())


def _own_socket(config: Config) -> socket.socket:
    from whisperd.config import socket_path

    return _unix_socket(socket_path(config, os.environ, uid=os.getuid()), config)


def _unix_socket(path: Path, config: Config, purpose: str = "") -> socket.socket:
    from whisperd.serving.sockets import bind_unix

    listener = bind_unix(path, mode=int(config.server.socket_mode, 8), group=config.server.socket_group)
    log.info("listening at %s%s", path, purpose)
    return listener


def _tcp_sockets(config: Config) -> Sequence[socket.socket]:
    """The TCP listener, if the configuration has one."""
    if not config.server.tcp:
        return ()
    from whisperd.serving.sockets import bind_tcp

    listener = bind_tcp(config.server.tcp)
    log.info("listening at http://%s", config.server.tcp)
    return (listener,)


def _wyoming_sockets(config: Config, passed: Sequence[socket.socket]) -> Sequence[socket.socket]:
    """The sockets that systemd has passed, else the one that the configuration names."""
    address = config.server.wyoming
    if not (passed or address):
        return ()
    from whisperd.serving import wyoming
    from whisperd.serving.sockets import bind_tcp

    wyoming.require()
    if passed or address is None:
        return passed
    if address.startswith(UNIX):
        return (_unix_socket(Path(address.removeprefix(UNIX)), config, FOR_WYOMING),)
    listener = bind_tcp(address, option="server.wyoming")
    log.info("listening at %s%s", address, FOR_WYOMING)
    return (listener,)


def _notify(error: Error, notifier: Notifier) -> None:
    notifier.status(str(error))
    if isinstance(error, ConfigError):
        notifier.errno(errno.EINVAL)


def _turn_away(error: Error, inherited: Sequence[Inherited], read: Callable[[], object]) -> None:
    """Answers the clients that wait in inherited sockets with the error."""
    waiting = [one.socket for one in inherited if one.name != WYOMING and one.socket.fileno() >= 0]
    if not waiting:
        return
    from whisperd.serving.http.server import turn_away

    def healed() -> bool:
        try:
            read()
        except ConfigError:
            return False
        return isinstance(error, ConfigError)

    turn_away(waiting, error, healed)
