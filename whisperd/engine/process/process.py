"""Starts, kills and reaps an engine's process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# -P keeps the current directory out of the child's path; a checkout that is not installed still has to be found
COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import sys; sys.path.append(sys.argv[1]); from whisperd.engine.process.worker import main; main()",
    str(Path(__file__).parents[3]),
)
# systemd's variables are meant for the daemon; an engine downloads nothing and needs no token
NOT_INHERITED = (
    "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "WATCHDOG_USEC", "WATCHDOG_PID",
    "CREDENTIALS_DIRECTORY", "HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip
ABORT_S = 1.0  # from SIGABRT, which prints the stack of every thread, to SIGKILL
REAP_S = 10.0  # the kernel may take so long to free gigabytes


class Process:
    """One child process. It inherits stderr, its end of a socket pair, and a pipe whose closing kills it.

    Args:
        environ: the daemon's environment.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.end, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={name: value for name, value in environ.items() if name not in NOT_INHERITED},
                process_group=0,  # a terminal's Ctrl-C is for the daemon
                bufsize=0,
            )

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._popen.pid

    def how_it_ended(self) -> str:
        """Waits for the end of a process that has closed its socket; returns how it ended, in words."""
        try:
            return ending(self._popen.wait(REAP_S))
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its socket and did not end; it was killed"

    def wait(self, timeout_s: float) -> bool:
        """Waits for the end; True if it came in time."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)
        return self._popen.returncode is not None

    def abort(self) -> None:
        """Makes a hung process print its stacks, and kills it."""
        with suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGABRT)
        if not self.wait(ABORT_S):
            self.kill()

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        with suppress(ProcessLookupError):
            self._popen.kill()
        self.wait(REAP_S)

    def close(self) -> None:
        """Closes its pipe, which kills a process that still runs."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self.wait(REAP_S)


def environment() -> Mapping[str, str]:
    """The environment of this process, read when an engine is opened."""
    return os.environ


def ending(code: int) -> str:
    """How a process ended, from its exit code, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed ({name}): out of memory?" if -code == signal.SIGKILL else f"was killed ({name})"
