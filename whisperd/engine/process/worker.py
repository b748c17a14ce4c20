"""The process that runs an engine for the daemon: a loop between the daemon's socket and the engine.

It ends when the daemon ends, however that ends and whatever this process does at that moment.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from whisperd.engine.base import Engine, Outcome, WindowFailure
from whisperd.engine.process.messages import Message, MessageSocket, portable
from whisperd.errors import Error
from whisperd.metrics import ModelMeter, Stage

log = logging.getLogger(__name__)

LIFELINE = 0  # standard input: a pipe that the daemon holds open and never writes to
CALL_THREADS = 32  # they wait for the device together: streams of speech cost little beside each other
IGNORED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
)  # the daemon handles these
OOM_SCORE = Path("/proc/self/oom_score_adj")
OOM_PREFERENCE = "500"  # this process can be replaced, the daemon with its socket cannot


def main() -> None:
    """Serves the daemon at the other end of the socket whose number is the last argument."""
    faulthandler.enable()  # a crash, or the daemon's SIGABRT, prints the stack of every thread
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the memory holds recordings of users
    end_with_parent()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        OOM_SCORE.write_text(OOM_PREFERENCE, encoding="ascii")
    connection = MessageSocket(socket.socket(fileno=int(sys.argv[-1])))
    logging.getLogger().addHandler(ForwardingHandler(connection))
    logging.getLogger("whisperd").setLevel(logging.DEBUG)  # the daemon filters by its own level, which may change
    code = Worker(connection).run()
    os._exit(code)  # the exit handlers of libraries take time, or hang; the kernel frees everything anyway


def end_with_parent() -> None:
    """Has the kernel kill this process when the other end of the lifeline is closed: stopped or stuck ones as well."""
    fcntl.fcntl(LIFELINE, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(LIFELINE, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(LIFELINE, fcntl.F_SETFL, fcntl.fcntl(LIFELINE, fcntl.F_GETFL) | os.O_ASYNC)


class ForwardingHandler(logging.Handler):
    """Sends log records to the daemon."""

    def __init__(self, connection: MessageSocket) -> None:
        super().__init__()
        self._connection = connection
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Sends the name, the level and the message with its traceback."""
        with contextlib.suppress(OSError):
            self._connection.send("log", (record.name, record.levelno, self.format(record)))


class ForwardingMeter(ModelMeter):
    """Sends the figures of the engine to the daemon's meter."""

    def __init__(self, connection: MessageSocket) -> None:
        self._connection = connection

    def observe_batch(self, n_windows: int, duration_s: float) -> None:
        """A batch was decoded."""
        self._connection.send("meter", ("observe_batch", (n_windows, duration_s)))

    def count_halving(self, stage: Stage) -> None:
        """The memory was not enough."""
        self._connection.send("meter", ("count_halving", (stage,)))


class Worker:
    """Opens the engine of the first message, and runs it."""

    def __init__(self, connection: MessageSocket) -> None:
        self._connection = connection
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._received = 0
        self._sent_admissible = 0
        self._calls: Mapping[str, Callable[..., Any]] = {}
        self._pool = ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="call")

    def run(self) -> int:
        """Returns the exit code."""
        first = self._connection.receive()
        if first is None:
            return 0
        try:
            engine: Engine = first.value(ForwardingMeter(self._connection))
            self._calls = calls_of(engine)
            self._sent_admissible = engine.free_slots
            self._connection.send("opened", (engine.info, tuple(self._calls)))
            threading.Thread(target=self._receive_all, daemon=True).start()
            self._serve(engine)
        except Error as error:
            self._connection.send("failed", portable(error))
            return 1
        except Exception as error:
            log.exception("the engine broke")
            self._connection.send("failed", portable(error))
            return 1
        return 0

    def _receive_all(self) -> None:
        """Reads in a thread, so that the daemon never waits for a step to end."""
        while (message := self._connection.receive()) is not None:
            if message.kind == "call":
                self._pool.submit(self._answer, *message.value)
            else:
                self._inbox.put(message)
        os._exit(0)

    def _serve(self, engine: Engine) -> None:
        while self._handle_messages(engine):
            self._send_turn(engine, engine.step())
        engine.close()

    def _handle_messages(self, engine: Engine) -> bool:
        """Handles the received messages, and waits for one while the engine is empty; False after "close"."""
        while not self._inbox.empty() or engine.free_slots == engine.info.slots:
            self._send_turn(engine, ())
            message = self._inbox.get()
            if message.kind == "close":
                return False
            if message.kind == "admit":
                self._received += len(message.value)
                engine.admit(message.value)
            elif message.kind == "cancel":
                engine.cancel(message.value)
        return True

    def _send_turn(self, engine: Engine, outcomes: Sequence[Outcome]) -> None:
        """Sends finished windows, and how many windows in all the engine could have received by now."""
        admissible = self._received + engine.free_slots
        if outcomes or admissible != self._sent_admissible:
            self._sent_admissible = admissible
            self._connection.send("turn", ([_portable(outcome) for outcome in outcomes], admissible))

    def _answer(self, call_id: int, name: str, arguments: Sequence[Any]) -> None:
        try:
            value, failure = self._calls[name](*arguments), None
        except Error as error:
            value, failure = None, portable(error)
        except Exception as error:
            log.exception("%s failed", name)
            value, failure = None, portable(error)
        self._connection.send("answer", (call_id, value, failure))


def calls_of(engine: Engine) -> Mapping[str, Callable[..., Any]]:
    """The methods that the daemon may call, by name; each call runs in a thread."""
    detector = getattr(engine, "detector", None)
    return {} if detector is None else {"detect": detector.run}


def _portable(outcome: Outcome) -> Outcome:
    return replace(outcome, error=portable(outcome.error)) if isinstance(outcome, WindowFailure) else outcome
