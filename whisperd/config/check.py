"""What cannot work on this machine, found before anything starts: directories, addresses, names and keys."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from whisperd.config.environment import cache_dir, cache_dir_origin, endpoint, expand, offline, spool_dir
from whisperd.config.load import Loaded
from whisperd.config.options import Config
from whisperd.config.secrets import Token, tcp_key, token
from whisperd.errors import ConfigError, Problem

SOCKET_PATH_BYTES = 107  # sun_path has 108 with its closing zero
UNIX = "unix:"
LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})

Finding = tuple[str, str]  # the key of an option, and what is wrong with its value


def check(loaded: Loaded, environ: Mapping[str, str]) -> Loaded:
    """Returns the configuration with further warnings; raises ConfigError with everything that cannot work here."""
    config = loaded.config
    problems = [
        Problem(where=_where(loaded, environ, key), key=key, message=message)
        for key, message in (*_directories(config, environ), *_sockets(config, environ), *_group(config))
    ]
    for read in (lambda: tcp_key(config, environ), lambda: token(environ), lambda: endpoint(config, environ)):
        try:
            read()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return replace(loaded, warnings=(*loaded.warnings, *warnings(config, environ)))


def warnings(config: Config, environ: Mapping[str, str], given: Token | None = None) -> Iterator[str]:
    """Yields what works but is probably a mistake; ``given`` is a token that comes before those of the environment."""
    address = endpoint(config, environ)
    if not offline(config, environ) and _is_readable_on_the_way(address) and (found := given or token(environ)):
        yield (
            f"the token of {found.origin} goes to {address} without encryption: anyone on the way can read it; "
            "use https://"
        )
    if config.force:
        yield (
            f"force = true: each start and each reload downloads all files of {_models(config)} anew; remove it, and "
            "use whisperd reconcile --force once"
        )


def _directories(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    spool = spool_dir(config, environ)
    if not _is_directory(spool):
        yield (
            "server.spool_dir",
            f"expects a directory that exists, got {str(spool)!r}; make it, or name another",
        )
    elif not os.access(spool, os.W_OK | os.X_OK):
        yield "server.spool_dir", f"{spool} cannot be written by {_user()}; change its owner, or name another"
    cache = cache_dir(config, environ)
    if (existing := _existing(cache)) is not None and not _is_directory(existing):
        yield "cache_dir", f"expects a directory, got {str(cache)!r}: {existing} is none"
    elif _is_directory(cache) and not os.access(cache, os.R_OK | os.X_OK):
        yield "cache_dir", f"{cache} cannot be read by {_user()}"


def _sockets(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    paths: dict[str, Path] = {}
    if config.server.socket:
        paths["server.socket"] = expand(config.server.socket, environ)
    if config.server.wyoming and config.server.wyoming.startswith(UNIX):
        paths["server.wyoming"] = Path(config.server.wyoming.removeprefix(UNIX))
    for key, path in paths.items():
        yield from ((key, message) for message in _socket_path(path))
    if len(paths) > len(set(paths.values())):
        yield "server.wyoming", f"must differ from server.socket, got {str(paths['server.socket'])!r} for both"
    if config.server.tcp and config.server.tcp == config.server.wyoming:
        yield "server.wyoming", f"must differ from server.tcp, got {config.server.tcp!r} for both"


def _socket_path(path: Path) -> Iterator[str]:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        yield f"expects at most {SOCKET_PATH_BYTES} bytes, as the path of a Unix socket may have, got {str(path)!r}"
    elif _is_something_else(path):
        yield f"expects the path of a socket, got {str(path)!r}, which is something else"
    elif (existing := _existing(path.parent)) is not None and not _is_directory(existing):
        yield f"expects the path of a socket, got {str(path)!r}: {existing} is no directory"


def _group(config: Config) -> Iterator[Finding]:
    if (name := config.server.socket_group) is None:
        return
    try:
        grp.getgrnam(name)
    except KeyError:
        yield "server.socket_group", f"expects a group of this machine, got {name!r}"


def _existing(path: Path) -> Path | None:
    """The path or its nearest existing parent; None if this user may not look there."""
    with suppress(OSError):
        return next(one for one in (path, *path.parents) if os.path.lexists(one))
    return None


def _is_directory(path: Path) -> bool:
    """True for a directory; False also if this user may not look there."""
    with suppress(OSError):
        return path.is_dir()
    return False


def _is_something_else(path: Path) -> bool:
    """True for a path that exists and is no socket."""
    with suppress(OSError):
        return not stat.S_ISSOCK(path.stat().st_mode)
    return False


def _where(loaded: Loaded, environ: Mapping[str, str], key: str) -> str:
    """What set an option: a file, ``-o`` or a variable; empty for a default."""
    origin = cache_dir_origin(loaded.config, environ) if key == "cache_dir" else "default"
    return loaded.origins[key] if origin in ("default", "cache_dir") and loaded.origins[key] != "default" else origin


def _is_readable_on_the_way(address: str) -> bool:
    """True for http to anything but this machine."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme != "http" or host in LOOPBACK_NAMES:
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _models(config: Config) -> str:
    n_models = len(config.models)
    return "the model" if n_models == 1 else f"{n_models} models"


def _user() -> str:
    """The user of this process, by name where there is one."""
    with suppress(KeyError):
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    return f"user {os.geteuid()}"
