"""Listening sockets: Unix, TCP, and those that systemd passes."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import socket
import stat
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from whisperd.errors import ConfigError, Problem, UsageError

FIRST_INHERITED_FD = 3  # sd_listen_fds(3)
PATH_BYTES_MAX = 107  # sun_path has 108 with its closing zero
BACKLOG = 2048
MAX_PORT = 65_535
PROBE_S = 1.0
LOCK_S = 10.0  # for another daemon to find out whether it may listen; takes milliseconds
LOCK_POLL_S = 0.01


class UnixSocket(socket.socket):
    """A listening socket that removes its path when it is closed, if the path is still its own."""

    path: Path
    inode: tuple[int, int]

    def close(self) -> None:
        """Removes the path, then stops listening."""
        with contextlib.suppress(OSError):
            if self.fileno() >= 0 and _inode(self.path) == self.inode:
                self.path.unlink()
        super().close()


def bind_unix(path: Path, *, mode: int, group: str | None) -> socket.socket:
    """A listening socket at ``path``, which appears with its final mode or a narrower one.

    A socket file without a listener is replaced.

    Raises:
        ConfigError: the path, its directory or the group cannot be used.
        UsageError: another process listens there.
    """
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise _problem("socket", f"{path} is longer than the {PATH_BYTES_MAX} bytes that a Unix socket's path may have")
    gid = _gid(group)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _refuse_foreign(path.parent)
        with _one_at_a_time(path.parent):
            _clear(path)
            return _bound(path, mode, gid)
    except OSError as error:
        raise _problem("socket", f"cannot listen at {path}: {error.strerror}") from error


def bind_tcp(address: str, *, option: str = "server.tcp") -> socket.socket:
    """A listening socket at ``host:port`` or ``[v6]:port``; raises ConfigError, which names the option."""
    host, port = split_address(address, option=option)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _address_problem(option, f"cannot listen at {address}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _address_problem(option, f"cannot listen at {address}: {error.strerror}") from error
    return listener


def split_address(address: str, *, option: str = "server.tcp") -> tuple[str, int]:
    """Host and port; raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise _address_problem(option, f'expects "127.0.0.1:9000" or "[::1]:9000", got {address!r}')
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """A socket that systemd has passed, and what its unit calls it (``FileDescriptorName=``); no name where unknown."""

    socket: socket.socket
    name: str


def inherited_sockets(environ: MutableMapping[str, str]) -> list[Inherited]:
    """The sockets that systemd passes, in its order; takes the variables out, so that no child believes them.

    Raises ConfigError when one of them is not a listening stream socket.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    names += [""] * (int(count) - len(names))
    return [
        Inherited(socket=_inherited(fd), name=name)
        for fd, name in enumerate(names[: int(count)], start=FIRST_INHERITED_FD)
    ]


def _bound(path: Path, mode: int, gid: int | None) -> UnixSocket:
    listener = UnixSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # before bind, Linux takes this for the mode of the file to come: there is no moment with a wider one
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(path))
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError:
        socket.socket.close(listener)
        raise
    listener.path, listener.inode = path, _inode(path)
    return listener


def _refuse_foreign(directory: Path) -> None:
    """Whoever owns the directory can put another socket in place of ours, as anybody could prepare one in /tmp."""
    owner = directory.stat().st_uid
    if owner not in {0, os.geteuid()}:
        raise _problem("socket", f"{directory} belongs to uid {owner}; set a path in a directory of your own")


def _clear(path: Path) -> None:
    """Removes a socket without a listener."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _problem("socket", f"{path} exists and is not a socket; move it away or set another path")
    except FileNotFoundError:
        return
    if _answers(path):
        raise UsageError(f"another daemon listens at {path}; stop it first, or set another server.socket")
    path.unlink()


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Two daemons that find the same dead socket must not both replace it. A lock on the directory leaves no file."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    until_s = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until_s:
                raise UsageError(
                    f"another process has held the lock on {directory} for {LOCK_S:g} s; see: lsof {directory}"
                ) from error
            time.sleep(LOCK_POLL_S)
        else:
            return


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except (TimeoutError, BlockingIOError):  # its backlog is full
            return True
    return True


def _gid(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise _problem("socket_group", f"there is no group {group!r}; create it or leave the option out") from error


def _inherited(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise _inherited_problem(fd, f"is not a socket ({error.strerror})") from error
    if not listening or listener.type != socket.SOCK_STREAM:
        listener.close()
        raise _inherited_problem(fd, "does not listen for streams; the socket unit needs ListenStream= and Accept=no")
    return listener


def _inherited_problem(fd: int, cause: str) -> ConfigError:
    return ConfigError(Problem(where="LISTEN_FDS", key="", message=f"file descriptor {fd} {cause}"))


def _address_problem(option: str, message: str) -> ConfigError:
    return ConfigError(Problem(where="", key=option, message=message))


def _problem(key: str, message: str) -> ConfigError:
    return ConfigError(Problem(where="", key=f"server.{key}", message=message))


def _inode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
