"""A daemon in a process of its own, which runs as long as one command needs it."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from whisperd.errors import Error
from whisperd.subprocesses import command, describe_end, environment, stop

STOP_TIMEOUT_S = 60.0
POLL_S = 0.2
MESSAGE_BYTES = 8192


@contextmanager
def temporary_daemon(directory: Path, arguments: Sequence[str], on_status: Callable[[str], None]) -> Iterator[Path]:
    """Starts a daemon, waits until it is ready, yields its socket, and stops it with SIGTERM as systemd does.

    Args:
        directory: an empty directory for its sockets, which the caller removes.
        arguments: arguments of ``whisperd serve``.
        on_status: called with each status line of the daemon until it is ready.
    """
    socket_path, notify_path = directory / "whisperd.sock", directory / "notify.sock"
    own = [
        "-o",
        f"server.socket='{socket_path}'",
        "-o",
        'server.tcp=""',
        "-o",
        'server.wyoming=""',
        "-o",
        'log_level="warning"',
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(notify_path))
        process = subprocess.Popen(
            command("whisperd.cli", "serve", *arguments, *own),
            env={**environment(os.environ), "NOTIFY_SOCKET": str(notify_path)},
        )
        try:
            _wait_until_ready(notify, process, on_status)
            threading.Thread(target=_drop, args=(notify,), daemon=True).start()
            yield socket_path
        finally:
            code = stop(process, STOP_TIMEOUT_S)
    if code:
        raise Error(f"the daemon {describe_end(code)}")


def _wait_until_ready(
    notify: socket.socket, process: subprocess.Popen[bytes], on_status: Callable[[str], None]
) -> None:
    """Receives notifications as systemd does. There is no deadline: a first start may fetch a model."""
    notify.settimeout(POLL_S)
    while process.poll() is None:
        try:
            message = notify.recv(MESSAGE_BYTES).decode()
        except TimeoutError:
            continue
        if message.startswith("STATUS="):
            on_status(message.removeprefix("STATUS="))
        if message == "READY=1":
            return
    raise NotStarted(process.returncode)


def _drop(notify: socket.socket) -> None:
    """Receives and drops further notifications, because a full socket would block the daemon."""
    while notify.fileno() >= 0:
        with suppress(OSError):
            notify.recv(MESSAGE_BYTES)


class NotStarted(Error):
    """The daemon ended before it was ready; its message is on stderr."""

    def __init__(self, code: int) -> None:
        super().__init__("the daemon did not start")
        self.remote_exit_code = code if code > 0 else 1
