"""Decodes untrusted files in processes of their own, with limits on memory and CPU time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import BinaryIO

import numpy as np

from whisperd.errors import AudioError, AudioTooLong, Error, RequestError
from whisperd.speech.audio import AudioRequest, Recording
from whisperd.speech.decoder_messages import END, ERROR, SAMPLES, STOPPED, Job, receive
from whisperd.speech.units import Samples
from whisperd.subprocesses import SECRETS, command, describe_end, environment, stop

log = logging.getLogger(__name__)

MEMORY_BYTES = 256 << 20  # an index of a day of MP4 takes 200 MB; what else is decoded, less than 30
CPU_S = 30  # to open a file
CPU_PER_S = 0.5  # for each second of audio: a hundred times what the slowest codec takes
STOP_S = 1.0
REPEATED = frozenset({None, signal.SIGKILL})  # ends that the file has not brought about, as a rule
NOTHING = np.zeros(0, np.float32)
# Libraries start a thread for each core, which a process that forks must not have.
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class IsolatedDecoder:
    """A ``Decoder`` whose files cannot harm this process: from any thread, as many files at once as there are.

    The server process is started by ``start`` or the first file, and again when it has ended. ``close`` ends it with
    all that it decodes.

    Args:
        environ: the daemon's environment.
        memory_bytes: what one file may allocate.
        cpu_s: CPU time that a file may take in addition to ``CPU_PER_S`` for each second of audio.
    """

    def __init__(self, environ: Mapping[str, str], *, memory_bytes: int = MEMORY_BYTES, cpu_s: int = CPU_S) -> None:
        self._environ = environ
        self._memory_bytes = memory_bytes
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The server process, None before the first file and while it is replaced."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the server process, so that the first file need not wait for it; returns at once."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """Ends the server process."""
        with self._lock:
            self._stop()

    @contextmanager
    def open(self, file: BinaryIO, request: AudioRequest) -> Iterator[Recording]:
        """See ``Decoder``."""
        with _on_disk(file) as on_disk:
            recording = _Recording(self, on_disk, request)
            try:
                recording.begin()
                yield recording
            finally:
                recording.close()

    def submit(self, file: BinaryIO, request: AudioRequest) -> socket.socket:
        """Has a process decode the file; its messages come through the socket, and closing that ends it."""
        job = Job(
            name=request.name,
            max_s=request.max_s,
            track=request.track,
            memory_bytes=self._memory_bytes,
            cpu_s=self._cpu_s,
            cpu_per_s=CPU_PER_S,
        )
        data = json.dumps(asdict(job)).encode()
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                socket.send_fds(self._started(), [data], [file.fileno(), theirs.fileno()])
            except (BrokenPipeError, ConnectionResetError):
                log.warning("the process that decodes audio has ended; starting another one")
                self._stop()
                socket.send_fds(self._started(), [data], [file.fileno(), theirs.fileno()])
        return ours

    def _started(self) -> socket.socket:
        if self._control is None or self._process is None or self._process.poll() is not None:
            self._stop()
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    command("whisperd.speech.decoder_server", str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment(self._environ, without=SECRETS) | SINGLE_THREADED,
                    process_group=0,  # a terminal's Ctrl-C is for the daemon
                )
        return self._control

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            stop(self._process, STOP_S)
        self._control = self._process = None


class _StoppedError(Exception):
    """The process ended without an answer: the kernel's signal, None where the server ended with it."""

    def __init__(self, number: int | None) -> None:
        super().__init__(number)
        self.number = number


class _Recording:
    """See ``Recording``. A process that was killed from outside is replaced once; what was read is skipped then."""

    def __init__(self, decoder: IsolatedDecoder, file: BinaryIO, request: AudioRequest) -> None:
        self._decoder = decoder
        self._file = file
        self._request = request
        self._end = decoder.submit(file, request)
        self._n_read = 0
        self._n_skipped = 0
        self._is_second = False
        self.length_s: float | None = None
        self.warnings: tuple[str, ...] = ()

    def begin(self) -> None:
        """Waits until the file is open."""
        self._receive()

    def close(self) -> None:
        """Ends the process, wherever it is."""
        self._end.close()

    def blocks(self) -> Iterator[Samples]:
        """See ``Recording``."""
        while (block := self._receive()) is not None:
            fresh = block[self._n_skipped :]
            self._n_skipped -= len(block) - len(fresh)
            self._n_read += len(fresh)
            if len(fresh):
                yield fresh

    def _receive(self) -> Samples | None:
        """The next block, which is empty for the head of the answer; None is the end."""
        try:
            return self._taken()
        except _StoppedError as error:
            if self._is_second or error.number not in REPEATED:
                raise AudioError(self._reason(error.number)) from error
        log.warning("a process that decoded audio was killed; the file is decoded again")
        self.close()
        self._is_second, self._n_skipped = True, self._n_read
        self._end = self._decoder.submit(self._file, self._request)
        return self._receive()

    def _taken(self) -> Samples | None:
        try:
            kind, data = receive(self._end)
        except (EOFError, ConnectionResetError):
            raise _StoppedError(None) from None
        if kind == SAMPLES:
            return np.frombuffer(data, np.float32)
        value = json.loads(data)
        if kind == STOPPED:
            raise _StoppedError(-value)
        if kind == ERROR:
            raise _as_error(value)
        if kind == END:
            self.warnings = tuple(value)
            return None
        self.length_s = value
        return NOTHING

    def _reason(self, number: int | None) -> str:
        label = self._request.label
        if number == signal.SIGXCPU:
            return f"{label} takes more CPU time to decode than its length allows; is the file damaged?"
        how = describe_end(-number) if number else "ended without an answer"
        return f"{label} cannot be decoded: the process that decoded it {how}"


def _as_error(value: dict[str, str]) -> Error:
    if value["name"] == RequestError.__name__:
        return RequestError(value["message"], param=value["param"])
    return (AudioTooLong if value["name"] == AudioTooLong.__name__ else AudioError)(value["message"])


@contextmanager
def _on_disk(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file itself where it has a descriptor, else a copy in memory that has one."""
    try:
        file.fileno()
    except (AttributeError, OSError):
        with os.fdopen(os.memfd_create("audio"), "w+b") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            yield copy
    else:
        yield file
