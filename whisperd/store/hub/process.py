"""A child process that talks to the Hub: started, listened to, watched, killed.

huggingface_hub cannot be cancelled, reads its settings once at import, and may wait for ever; a process can be killed
in milliseconds and starts clean each time. The job goes in through stdin, where no other user can read the token;
stdin stays open, and the child ends when it closes, so that it never outlives this process.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from whisperd import subprocesses
from whisperd.config import hide
from whisperd.errors import Cancelled, HubError, StoreError
from whisperd.store.hub.failures import KINDS
from whisperd.subprocesses import SECRETS, LastLine, command, describe_end, kill_group

log = logging.getLogger(__name__)

POLL_S = 0.05
START_S = 60.0  # a child may start slowly on a busy machine

Message = Mapping[str, Any]


class Stalled(Exception):
    """Too little came for too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach the Hub, and how patient to be.

    Args:
        endpoint: address without a slash at the end.
        token: the secret, or None.
        state_dir: a writable directory for what the library keeps besides the cache.
        metadata_timeout_s: how long one answer may take.
        stall_timeout_s: a download fails when fewer than ``MIN_BYTES_PER_S`` came on average for so long.
        retry_wait_s: how long to wait before the second try; each further wait is twice as long.
    """

    endpoint: str
    token: str | None = field(default=None, repr=False)
    state_dir: Path
    metadata_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    retry_wait_s: float = 1.0


def environment(connection: Connection) -> dict[str, str]:
    """The settings that huggingface_hub reads when it is imported."""
    return {
        "HF_HOME": str(connection.state_dir),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_XET": "1",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What counts as progress: at least ``min_bytes`` more in each ``window_s``, or the end of the job."""

    window_s: float
    min_bytes: float = 1.0


def run(job: Message, pace: Pace, *, cancel: threading.Event, size_bytes: Callable[[], int] = lambda: 0) -> Message:
    """Starts a child for the job; returns its last message.

    ``size_bytes`` is called many times a second and says how much has arrived.

    Raises:
        Cancelled: ``cancel`` was set; the child is killed.
        Stalled: it was slower than ``pace``; the child is killed.
        HubError: the child ended without a message.
        StoreError: what the child reported.
    """
    with _child(job) as child:
        return _result(child, Watch(pace, cancel, size_bytes), job.get("token"))


class Watch:
    """Waits for a child as long as enough arrives.

    ``clock_s`` gives seconds from any beginning.
    """

    def __init__(
        self,
        pace: Pace,
        cancel: threading.Event,
        size_bytes: Callable[[], int],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = pace
        self._cancel = cancel
        self._measure = size_bytes
        self._clock_s = clock_s
        self._from_bytes = size_bytes()
        self._deadline_s = clock_s() + START_S + pace.window_s

    def next(self, lines: queue.SimpleQueue[str | None]) -> str | None:
        """The next line; raises Stalled or Cancelled."""
        while not self._cancel.is_set():
            with suppress(queue.Empty):
                return lines.get(timeout=POLL_S)
            self.look()
        raise Cancelled("cancelled while talking to the Hub")

    def look(self) -> None:
        """Begins a new window when enough has arrived; raises Stalled when that takes too long."""
        size_bytes = self._measure()
        self._from_bytes = min(self._from_bytes, size_bytes)  # a part that was useless has begun anew
        if size_bytes - self._from_bytes >= self._pace.min_bytes:
            self._from_bytes = size_bytes
            self.restart()
        elif self._clock_s() > self._deadline_s:
            raise Stalled

    def restart(self) -> None:
        """Begins a new window now."""
        self._deadline_s = self._clock_s() + self._pace.window_s

    def allow(self, wait_s: float) -> None:
        """Makes the window longer by a wait that the Hub has asked for."""
        self._deadline_s += wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    """A running child and its output: ``lines`` of stdout, None behind them, and the last line of stderr."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str | None]
    reader: threading.Thread
    last_line: LastLine


@contextmanager
def _child(job: Message) -> Iterator[_Child]:
    process = subprocess.Popen(
        command("whisperd.store.hub.worker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=subprocesses.environment(os.environ, without=SECRETS),
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    with process:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(_pipe(process.stdout), lines), daemon=True)
        reader.start()
        child = _Child(process=process, lines=lines, reader=reader, last_line=LastLine(_pipe(process.stderr)))
        try:
            _send(process, job)
            yield child
        finally:
            kill_group(process)
            reader.join()  # before the pipes are closed under the readers
            child.last_line.join()
            with suppress(BrokenPipeError):
                process.stdin.close() if process.stdin else None


def _send(process: subprocess.Popen[str], job: Message) -> None:
    stdin = _pipe(process.stdin)
    with suppress(BrokenPipeError):  # a child that died at once says why on stderr
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()


def _result(child: _Child, watch: Watch, secret: str | None) -> Message:
    while (line := watch.next(child.lines)) is not None:
        message: Message = json.loads(line)
        match message["event"]:
            case "error":
                raise failure(message)
            case "ready":
                watch.restart()
            case "retry":
                watch.allow(message["wait_s"])
            case _:
                return message
    last_line = hide(child.last_line.join(), [secret] if secret else [])
    ending = describe_end(child.process.wait(), last_line)
    raise HubError(f"the process that talks to the Hub {ending}; run it again")


def _pipe(stream: IO[str] | None) -> IO[str]:
    """A pipe that was asked for is there; only the types do not know it."""
    if stream is None:
        raise HubError("the process that talks to the Hub has no pipe")
    return stream


def failure(message: Message) -> StoreError:
    """The error that a child reported."""
    return KINDS[message["kind"]](message["message"])


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
