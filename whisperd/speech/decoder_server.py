"""The process that decoders come from: it has loaded FFmpeg, and forks a process of its own for each file.

A file can crash FFmpeg, or make it allocate and compute without end. Here that ends one process: no other request
notices. A fork costs about a millisecond, and what a file has done to the memory goes with its process.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import BinaryIO, NoReturn

from whisperd.errors import AudioError, RequestError
from whisperd.speech.audio import AudioRequest, InProcessDecoder
from whisperd.speech.decoder_messages import (
    END,
    ERROR,
    JOB_BYTES_MAX,
    LENGTH,
    STOPPED,
    Job,
    send_json,
    send_samples,
)
from whisperd.speech.units import SAMPLE_RATE_HZ

MEBIBYTE = 1 << 20


def main() -> None:
    """Serves the socket whose descriptor is the first argument, until the daemon closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM):  # the daemon ends last what requests still need
        signal.signal(number, signal.SIG_IGN)
    import av.filter  # noqa: F401  # and with it all that decoding needs, once for all children

    gc.collect()
    gc.freeze()  # what lives now is not touched, and so not copied, by collections in children
    with control:
        _Server(control).run()


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, socket.socket] = {}

    def run(self) -> None:
        """Forks for each job; says of each child that fails how it ended."""
        wake_up, woken = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake_up, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        while True:
            readable, _, _ = select.select([self._control.fileno(), wake_up], [], [])
            if wake_up in readable:
                with suppress(BlockingIOError):
                    os.read(wake_up, 4096)
                self._reap()
            if self._control.fileno() in readable and not self._start():
                for end in self._children.values():
                    end.close()
                return

    def _start(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, JOB_BYTES_MAX, 2)
        if not data:
            return False
        descriptor, end = descriptors[0], socket.socket(fileno=descriptors[1])
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for other in self._children.values():  # else this process would keep the answers of others open
                other.close()
            _work(Job(**json.loads(data)), descriptor, end)
        os.close(descriptor)
        self._children[pid] = end
        return True

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                with self._children.pop(pid) as end, suppress(OSError):
                    code = os.waitstatus_to_exitcode(status)
                    if code:
                        end.setblocking(False)
                        send_json(end, STOPPED, code)


def _work(job: Job, descriptor: int, end: socket.socket) -> NoReturn:
    """Decodes one file in a process of its own, which ends with it."""
    code = 1
    try:
        threading.Thread(target=_end_with, args=(end,), daemon=True).start()
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_DATA, _data_bytes() + job.memory_bytes)
        _limit_cpu(job, 0.0)
        with _file(descriptor) as file:
            _decode(job, file, end)
        code = 0
    except (AudioError, RequestError) as error:
        code = _report(end, error, error.param if isinstance(error, RequestError) else None)
    except MemoryError:
        label = AudioRequest(name=job.name).label
        limit = job.memory_bytes // MEBIBYTE
        code = _report(
            end, AudioError(f"{label} takes more than {limit} MiB of memory to decode; is the file damaged?")
        )
    except OSError:
        pass  # the daemon wants no more of it
    finally:
        os._exit(code)


def _decode(job: Job, file: BinaryIO, end: socket.socket) -> None:
    request = AudioRequest(name=job.name, max_s=job.max_s, track=job.track)
    with InProcessDecoder().open(file, request) as recording:
        send_json(end, LENGTH, recording.length_s)
        n_samples = 0
        for block in recording.blocks():
            n_samples += len(block)
            _limit_cpu(job, n_samples / SAMPLE_RATE_HZ)
            send_samples(end, block)
        send_json(end, END, recording.warnings)


def _report(end: socket.socket, error: AudioError | RequestError, param: str | None = None) -> int:
    """Sends an error; returns the exit code of a process that has answered."""
    with suppress(OSError):
        send_json(end, ERROR, {"name": type(error).__name__, "message": str(error), "param": param})
    return 0


def _end_with(end: socket.socket) -> None:
    """Ends this process as soon as the daemon closes its end, whatever the file makes it do."""
    with suppress(OSError):
        end.recv(1)
    os._exit(0)


def _file(descriptor: int) -> BinaryIO:
    """The file with a position of its own: descriptors that were sent share theirs."""
    try:
        return open(f"/proc/self/fd/{descriptor}", "rb")  # noqa: PTH123
    except OSError:
        return os.fdopen(descriptor, "rb")


def _limit_cpu(job: Job, audio_s: float) -> None:
    _limit(resource.RLIMIT_CPU, job.cpu_s + int(job.cpu_per_s * audio_s))


def _limit(kind: int, value: int) -> None:
    """Sets a limit that may be raised later; past it the kernel refuses memory, or ends the process."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _data_bytes() -> int:
    """What this process has allocated already, as the kernel counts it for the limit."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[5]) * resource.getpagesize()
