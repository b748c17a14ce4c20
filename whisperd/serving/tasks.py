"""Tasks that end with their client, the pace of an upload, and the end of accepting: shared by both front ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from whisperd.errors import Cancelled, RequestError

T = TypeVar("T")

JUST_ACCEPTED_S = 0.5  # during a drain: time for a connection's first request to arrive
CANCELLED_S = 5.0  # for tasks to end that the drain has cancelled
CANCELLED_RETRY_AFTER_S = 2.0  # for a client whose request the drain has cancelled
SETUP_STEPS = 3  # of the event loop, from accept to a connection that is known


class UploadStalled(RequestError):
    """The client stopped sending in the middle of its upload."""

    http_status = 408
    code = "upload_stalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How slow an upload may be: no pause longer than ``idle_s``, and no slower than ``bytes_per_s`` in the long run.

    Without the second limit a client could go on for days with a byte a minute. An upload that is slower than
    ``place_bytes_per_s`` during ``place_s`` goes on, but yields its place.
    """

    idle_s: float
    bytes_per_s: float = 0.0
    place_s: float = 3.0
    place_bytes_per_s: float = 16 * 1024

    def allows(self, n_bytes: int, elapsed_s: float) -> bool:
        """Whether so many bytes after so long are enough."""
        return elapsed_s <= self.idle_s or n_bytes >= elapsed_s * self.bytes_per_s


class SlowWatch:
    """Calls ``on_slow`` once, when an upload is slower than its place is worth; a context manager for its time.

    ``n_bytes`` is what has arrived, set by the upload.
    """

    def __init__(self, pace: Pace, on_slow: Callable[[], None]) -> None:
        self._pace = pace
        self._on_slow = on_slow
        self._before_bytes = 0
        self._next: asyncio.TimerHandle | None = None
        self.n_bytes = 0

    def __enter__(self) -> Self:
        self._look_later()
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.cancel()

    def _look_later(self) -> None:
        self._next = asyncio.get_running_loop().call_later(self._pace.place_s, self._look)

    def _look(self) -> None:
        if self.n_bytes - self._before_bytes < self._pace.place_s * self._pace.place_bytes_per_s:
            self._on_slow()
        else:
            self._before_bytes = self.n_bytes
            self._look_later()


async def run_unless_gone(work: Coroutine[Any, Any, T], gone: Coroutine[Any, Any, object]) -> T:
    """Runs ``work``; raises Cancelled when ``gone`` returns first. Either way no task is left when it returns."""
    task, leaving = asyncio.create_task(work), asyncio.create_task(gone)
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client went away")
        return task.result()
    finally:
        await cancel_and_wait(task)
        await cancel_and_wait(leaving)


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancels the task unless it is done, and waits for its end; its outcome is dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # else asyncio logs an exception that was never retrieved


async def stop_accepting(listeners: Sequence[socket.socket]) -> None:
    """Accepts no more; returns when connections that were accepted already are set up.

    asyncio drops a connection that it has accepted and not yet set up when its server is closed in between.
    """
    loop = asyncio.get_running_loop()
    for listener in listeners:
        loop.remove_reader(listener.fileno())
    for _ in range(SETUP_STEPS):
        await asyncio.sleep(0)
