"""Child processes that run whisperd's own code: how they are started, ended and described."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

LAST_LINE_CHARS = 300
KILL_TIMEOUT_S = 10.0  # what the kernel may take to free gigabytes

ROOT = Path(__file__).parents[1]
# -P keeps the current directory out of the child's path; a checkout that is not installed still has to be found.
START = (
    "import importlib, sys; _, root, module, *arguments = sys.argv; sys.path.append(root); "
    "sys.argv = [module, *arguments]; importlib.import_module(module).main()"
)
# What systemd says is meant for the process that it has started.
OF_SYSTEMD = frozenset(
    {
        "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "WATCHDOG_USEC",
        "WATCHDOG_PID",
    }
)  # fmt: skip
# Where tokens for the Hub may be.
SECRETS = frozenset({"CREDENTIALS_DIRECTORY", "HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN"})


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``main()`` of a module of whisperd; ``sys.argv[1:]`` are the arguments there."""
    return [sys.executable, "-P", "-c", START, str(ROOT), module, *arguments]


def environment(environ: Mapping[str, str], *, without: Collection[str] = ()) -> dict[str, str]:
    """The environment of a child: this process's without what is systemd's and without the names in ``without``."""
    return {name: value for name, value in environ.items() if name not in OF_SYSTEMD and name not in without}


def stop(
    process: subprocess.Popen[bytes] | subprocess.Popen[str],
    timeout_s: float,
    number: signal.Signals = signal.SIGTERM,
) -> int:
    """Sends a signal, waits, and kills the process if it is still running. Returns its exit code, -n for signal n."""
    with suppress(ProcessLookupError):
        process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout_s)
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # in an uninterruptible call to the kernel; it ends with that
        return process.wait(KILL_TIMEOUT_S)
    return -signal.SIGKILL


def kill_group(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kills a process and its children; it must have been started as the leader of its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def describe_end(code: int, last_line: str = "") -> str:
    """Says how a process has ended that did not report it itself.

    Args:
        code: exit code, or -n for signal n.
        last_line: what it wrote last on stderr.
    """
    if code >= 0:
        return f"ended with exit code {code}{': ' if last_line else ''}{last_line}"
    name = signal.Signals(-code).name
    return f"was killed ({name}): out of memory?" if -code == signal.SIGKILL else f"was killed ({name})"


class LastLine:
    """Reads a pipe to its end in a thread and keeps the last line that is not empty."""

    def __init__(self, stream: IO[str]) -> None:
        self._line = ""
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def join(self) -> str:
        """Waits until the pipe is closed at its other end; returns the line, shortened."""
        self._thread.join()
        return self._line

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._line = line.strip()[:LAST_LINE_CHARS] or self._line
