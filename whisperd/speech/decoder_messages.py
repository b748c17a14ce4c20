"""Messages from a decoder's process to the daemon: a byte for the kind, a length, and JSON or samples.

daemon -> server   a job (JSON), with two descriptors: the audio, and the socket of its answer
process -> daemon  length   samples ...   end | error
server -> daemon   stopped, for a process that could not answer
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from whisperd.speech.units import Samples

HEAD = struct.Struct("=cI")
LENGTH, SAMPLES, END, ERROR, STOPPED = b"L", b"S", b"E", b"X", b"K"
JOB_BYTES_MAX = 1 << 16  # a name of 255 bytes is far below it


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process decodes, beside the file itself; the fields are those of ``AudioRequest`` and the limits.

    ``memory_bytes`` may be allocated. CPU time may be ``cpu_s``, and ``cpu_per_s`` for each second of audio.
    """

    name: str | None
    max_s: float | None
    track: int | str | None
    memory_bytes: int
    cpu_s: int
    cpu_per_s: float


def send_json(end: socket.socket, kind: bytes, value: Any) -> None:
    """Sends a small message."""
    data = json.dumps(value).encode()
    end.sendall(HEAD.pack(kind, len(data)) + data)


def send_samples(end: socket.socket, samples: Samples) -> None:
    """Sends float32 [n]."""
    data = np.ascontiguousarray(samples).view(np.uint8).data
    end.sendall(HEAD.pack(SAMPLES, data.nbytes))
    end.sendall(data)


def receive(end: socket.socket) -> tuple[bytes, bytearray]:
    """The next message, as its kind and its bytes; raises EOFError when the other end is gone."""
    kind, n_bytes = HEAD.unpack(_exactly(end, HEAD.size))
    return kind, _exactly(end, n_bytes)


def _exactly(end: socket.socket, n_bytes: int) -> bytearray:
    found = bytearray(n_bytes)
    view = memoryview(found)
    while view:
        n_received = end.recv_into(view)
        if not n_received:
            raise EOFError
        view = view[n_received:]
    return found
