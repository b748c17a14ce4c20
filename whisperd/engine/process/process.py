"""Starts, kills and reaps an engine's process."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress

from whisperd.subprocesses import KILL_TIMEOUT_S, SECRETS, command, describe_end, environment, stop

ABORT_S = 1.0  # from SIGABRT, which prints the stack of every thread, to SIGKILL


class Process:
    """One child process. It inherits stderr, its end of a socket pair, and a pipe whose closing kills it.

    Args:
        environ: the daemon's environment.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.end, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                command("whisperd.engine.process.worker", str(theirs.fileno())),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment(environ, without=SECRETS),  # an engine fetches nothing
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
            return describe_end(self._popen.wait(KILL_TIMEOUT_S))
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
        stop(self._popen, ABORT_S, signal.SIGABRT)

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        with suppress(ProcessLookupError):
            self._popen.kill()
        self.wait(KILL_TIMEOUT_S)

    def close(self) -> None:
        """Closes its pipe, which kills a process that still runs."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self.wait(KILL_TIMEOUT_S)
