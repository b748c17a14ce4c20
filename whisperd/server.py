"""Listening sockets and the HTTP server on them. Home of uvicorn.

Three things that uvicorn does not do by itself are added on its public hooks: the kernel's word on who is at the other
end, a deadline for the head of a request, and a drain that does not cut off connections which were just accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import importlib
import json
import math
import os
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisperd.errors import ConfigError, Error, Problem, UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HttpBase

    ServerBase = uvicorn.Server
else:  # the classes below are mixed with these when uvicorn is imported
    HttpBase = ServerBase = object

FIRST_INHERITED_FD = 3  # sd_listen_fds(3)
PATH_BYTES_MAX = 107  # sun_path has 108 with its closing zero
BACKLOG = 2048
PROBE_S = 1.0
JUST_ACCEPTED_S = 0.5  # during a drain: time for a connection's first request to arrive
SETUP_STEPS = 3  # of the event loop, from accept to a connection that is known
CANCELLED_S = 5.0  # for tasks to end that the drain has cancelled
TURN_AWAY_S = 1.0  # for a client to send and to read while it is turned away
TURNED_AWAY_RETRY_S = 10
LINGER_S = 5.0  # at most a dozen starts in a minute, well below the StartLimitBurst= of the unit
HEAD_BYTES = 65536
PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Patience of the server. ``drain_s``: how long requests in flight may take after ``stop``."""

    header_timeout_s: float = 10.0
    keep_alive_s: int = 75
    drain_s: int = 60


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

    A socket file that nobody listens on is replaced.

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
        _clear(path)
        return _bound(path, mode, gid)
    except OSError as error:
        raise _problem("socket", f"cannot listen at {path}: {error.strerror}") from error


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


def turn_away(listeners: Sequence[socket.socket], error: Error, healed: Callable[[], bool]) -> int:
    """Answers 503 with the reason to everybody who waits in these sockets; returns how many that were.

    For a daemon that cannot start: unanswered connections would make systemd start it again at once, and again. Once
    somebody came it stays a while for the others, so that many clients do not cost a start each; but whoever comes
    when the cause is ``healed`` is left to the next start.
    """
    answer = _unavailable(error)
    count, patience_s, until_s = 0, 0.0, math.inf
    with selectors.DefaultSelector() as selector:
        for listener in listeners:
            listener.setblocking(False)  # a file description that is shared with systemd: it says nothing by itself
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
    except BlockingIOError:  # somebody else was faster
        return 0
    with connection, contextlib.suppress(OSError):
        connection.settimeout(TURN_AWAY_S)
        connection.recv(HEAD_BYTES)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        deadline_s = time.monotonic() + TURN_AWAY_S
        while time.monotonic() < deadline_s and connection.recv(HEAD_BYTES):
            pass  # a connection that is closed with something unread in it loses the answer
    return 1


def _unavailable(error: Error) -> bytes:
    from whisperd.api.answers import error_body

    body = json.dumps(error_body(error)).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"retry-after: {TURNED_AWAY_RETRY_S}",
        "connection: close",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Server:
    """Serves one application until it is told to stop. No signal handlers are installed."""

    def __init__(self, settings: ServerSettings | None = None) -> None:
        self._settings = settings or ServerSettings()
        self._stopping = False
        self._uvicorn: uvicorn.Server | None = None

    async def serve(self, app: ASGIApp, sockets: Sequence[socket.socket]) -> None:
        """Accepts on all sockets; returns after ``stop`` when the requests in flight are answered or out of time.

        The sockets are closed then.
        """
        self._uvicorn = _mixed(_Listener, "uvicorn:Server")(_config(app, self._settings))
        self._uvicorn.should_exit = self._stopping
        await self._uvicorn.serve(sockets=list(sockets))

    def stop(self) -> None:
        """Accept no more, finish what runs. From the event loop; may be called at any time, more than once."""
        self._stopping = True
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


def _config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    import uvicorn

    protocol = _mixed(_Connection, "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol")
    protocol.header_timeout_s = settings.header_timeout_s
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        workers=1,  # else uvicorn reads the environment
        proxy_headers=False,
        server_header=False,
        log_config=None,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.drain_s,
    )


def _mixed(mixin: type[Any], base: str) -> Any:
    """A class made of ``mixin`` and ``module:Class``, which is imported only now."""
    module, _, name = base.partition(":")
    return type(mixin.__name__, (mixin, getattr(importlib.import_module(module), name)), {})


class _Connection(HttpBase):
    """One connection. Nothing may be slow before the head of a request is complete; after it, everything may."""

    header_timeout_s: float
    _deadline: asyncio.TimerHandle | None = None
    _draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = _peer(transport.get_extra_info("socket"))
        if peer is not None:
            self.app_state = {**self.app_state, "peer": peer}
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._arm()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()
        if self._draining and self.cycle:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:  # answered early: the rest gets no more time than a head
            self._arm()

    def shutdown(self) -> None:
        """Called for each connection when the server stops."""
        self._draining = True
        if self.cycle:
            super().shutdown()
        else:
            self.loop.call_later(JUST_ACCEPTED_S, self._close_unused)

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if not self.cycle or self.cycle.response_complete:
            self.transport.close()

    def _close_unused(self) -> None:
        if not self.cycle:
            self.transport.close()


class _Listener(ServerBase):
    """uvicorn's server without its signal handlers, and with an end for tasks that it cancelled."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await stop_accepting(sockets or [])
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CANCELLED_S)


async def stop_accepting(listeners: Sequence[socket.socket]) -> None:
    """asyncio drops a connection that it has accepted and not yet set up when its server is closed in between."""
    loop = asyncio.get_running_loop()
    for listener in listeners:
        loop.remove_reader(listener.fileno())
    for _ in range(SETUP_STEPS):
        await asyncio.sleep(0)


def _peer(listener: socket.socket | None) -> tuple[int, int, int] | None:
    """(pid, uid, gid) of the process that connected, None for anything but a Unix socket."""
    if listener is None or listener.family != socket.AF_UNIX:
        return None
    data = listener.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    pid, uid, gid = PEER_CREDENTIALS.unpack(data)
    return pid, uid, gid


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
    """Removes a socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _problem("socket", f"{path} exists and is not a socket; move it away or set another path")
    except FileNotFoundError:
        return
    if _answers(path):
        raise UsageError(f"another daemon listens at {path}; stop it first, or set another server.socket")
    path.unlink()


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


def _problem(key: str, message: str) -> ConfigError:
    return ConfigError(Problem(where="", key=f"server.{key}", message=message))


def _inode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
