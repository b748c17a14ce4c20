"""Messages between the daemon and an engine's process: pickled, with arrays beside the pickle and not copied into it.

Both ends are the same program and trust each other; the socket has no name, and no other process can reach it.

    daemon -> child   open (opener)   admit (windows)   cancel (ids)   call (id, name, arguments)   close
    child -> daemon   opened (info, names of calls)   turn (outcomes, admissible)   meter (name, arguments)
                      log (name, level, message)   answer (id, value, error)   failed (error)
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from whisperd.errors import EngineError, Error

Kind = Literal[
    "open", "admit", "cancel", "call", "close", "opened", "turn", "meter", "log", "answer", "failed"
]  # fmt: skip

COUNT = struct.Struct("=I")
LENGTH = struct.Struct("=Q")
TIMEOUT = struct.Struct("@ll")  # struct timeval
BUFFER_BYTES = 1 << 20  # half a window: fewer turns between the two processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What the other end has said; ``value`` is as the table above has it."""

    kind: Kind
    value: Any


class MessageSocket:
    """One end of a stream socket. Any thread may send; one thread receives.

    Args:
        end: the socket; ``close`` closes it.
        send_timeout_s: how long the other end may read nothing; None waits without limit.
    """

    def __init__(self, end: socket.socket, *, send_timeout_s: float | None = None) -> None:
        self._socket = end
        self._lock = threading.Lock()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        if send_timeout_s is not None:
            seconds, rest = divmod(send_timeout_s, 1)
            # of the kernel, since Python's own timeout would hold for what is received as well
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEOUT.pack(int(seconds), int(rest * 1e6)))

    def send(self, kind: Kind, value: Any) -> None:
        """Sends a message; raises BlockingIOError when the other end reads nothing, OSError when it is closed."""
        beside: list[pickle.PickleBuffer] = []
        inside = pickle.dumps((kind, value), protocol=5, buffer_callback=beside.append)
        parts = [memoryview(inside), *(buffer.raw() for buffer in beside)]
        head = COUNT.pack(len(parts)) + b"".join(LENGTH.pack(part.nbytes) for part in parts)
        with self._lock:
            self._socket.sendall(head)
            for part in parts:
                self._socket.sendall(part)

    def receive(self) -> Message | None:
        """The next message; None when the other end is closed, also in the middle of one."""
        try:
            (n_parts,) = COUNT.unpack(self._exactly(COUNT.size))
            lengths = [length for (length,) in LENGTH.iter_unpack(self._exactly(LENGTH.size * n_parts))]
            inside, *beside = [self._exactly(length) for length in lengths]
        except (EOFError, OSError):
            return None
        kind, value = pickle.loads(inside, buffers=beside)
        return Message(kind=kind, value=value)

    def close(self) -> None:
        """Closes the socket, and ends ``receive`` in whichever thread it runs."""
        with suppress(OSError):  # the other end has closed it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, n_bytes: int) -> memoryview:
        found = np.empty(n_bytes, np.uint8).data  # not zeroed first, as a bytearray would be
        done = 0
        while done < n_bytes:
            received = self._socket.recv_into(found[done:])
            if not received:
                raise EOFError
            done += received
        return found


def portable(error: Exception) -> Error:
    """The error in a form that can be pickled: of the same class if that takes one message, else EngineError."""
    if not isinstance(error, Error):
        return EngineError(f"inference failed: {error}")
    try:
        return type(error)(str(error))
    except TypeError:
        return EngineError(str(error))
