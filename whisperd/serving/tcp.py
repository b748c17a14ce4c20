"""A listening TCP socket, for programs that know no Unix sockets."""

from __future__ import annotations

import socket

from whisperd.errors import ConfigError, Problem

BACKLOG = 2048
MAX_PORT = 65_535


def bind_tcp(address: str, *, option: str = "server.tcp") -> socket.socket:
    """A listening socket at ``host:port`` or ``[v6]:port``; raises ConfigError, which names the option."""
    host, port = split_address(address, option=option)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _problem(option, f"cannot listen at {address}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _problem(option, f"cannot listen at {address}: {error.strerror}") from error
    return listener


def split_address(address: str, *, option: str = "server.tcp") -> tuple[str, int]:
    """Host and port; raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise _problem(option, f'expects "127.0.0.1:9000" or "[::1]:9000", got {address!r}')
    return host.removeprefix("[").removesuffix("]"), int(port)


def _problem(option: str, message: str) -> ConfigError:
    return ConfigError(Problem(where="", key=option, message=message))
