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

LIFELINE = 0  # standard input: a pipe to which nobody writes
CALL_THREADS = 32  # they wait for the device together: streams of speech cost little beside each other
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # meant for the daemon, which finishes what runs first
OOM_SCORE = Path("/proc/self/oom_score_adj")
FIRST_TO_GO = "500"  # this process can be replaced, the daemon with its socket cannot


def main() -> None:
    """Serves the daemon at the other end of the socket whose number is the last argument."""
    faulthandler.enable()  # a crash, or the SIGABRT of a daemon that lost patience, shows where every thread was
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is in memory are other people's recordings
    die_with_parent()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        OOM_SCORE.write_text(FIRST_TO_GO, encoding="ascii")
    wire = MessageSocket(socket.socket(fileno=int(sys.argv[-1])))
    logging.getLogger().addHandler(ForwardingHandler(wire))
    logging.getLogger("whisperd").setLevel(logging.DEBUG)  # the daemon knows what is to be shown, now and later
    code = Worker(wire).run()
    os._exit(code)  # what libraries do at the end takes time, or hangs; the kernel takes everything back anyway


def die_with_parent() -> None:
    """Has the kernel kill this process when the other end of the lifeline is closed: stopped or stuck ones as well."""
    fcntl.fcntl(LIFELINE, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(LIFELINE, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(LIFELINE, fcntl.F_SETFL, fcntl.fcntl(LIFELINE, fcntl.F_GETFL) | os.O_ASYNC)


class ForwardingHandler(logging.Handler):
    """Hands records to the daemon, whose log they are."""

    def __init__(self, wire: MessageSocket) -> None:
        super().__init__()
        self._wire = wire
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Sends the name, the level and the message with its traceback."""
        with contextlib.suppress(OSError):
            self._wire.send("log", (record.name, record.levelno, self.format(record)))


class ForwardingMeter(ModelMeter):
    """Tells the daemon's meter what the engine tells this one."""

    def __init__(self, wire: MessageSocket) -> None:
        self._wire = wire

    def observe_batch(self, n_windows: int, duration_s: float) -> None:
        """A batch was decoded."""
        self._wire.send("meter", ("observe_batch", (n_windows, duration_s)))

    def count_halving(self, stage: Stage) -> None:
        """The memory was not enough."""
        self._wire.send("meter", ("count_halving", (stage,)))


class Worker:
    """Opens the engine that it is told to open, and runs it."""

    def __init__(self, wire: MessageSocket) -> None:
        self._wire = wire
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._received = 0
        self._told = 0
        self._calls: Mapping[str, Callable[..., Any]] = {}
        self._pool = ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="call")

    def run(self) -> int:
        """Returns the exit code."""
        first = self._wire.receive()
        if first is None:
            return 0
        try:
            engine: Engine = first.value(ForwardingMeter(self._wire))
            self._calls = calls_of(engine)
            self._told = engine.free_slots
            self._wire.send("opened", (engine.info, tuple(self._calls)))
            threading.Thread(target=self._listen, daemon=True).start()
            self._serve(engine)
        except Error as error:
            self._wire.send("failed", portable(error))
            return 1
        except Exception as error:
            log.exception("the engine broke")
            self._wire.send("failed", portable(error))
            return 1
        return 0

    def _listen(self) -> None:
        """Reads at any time, so that the daemon never waits for a step to end."""
        while (message := self._wire.receive()) is not None:
            if message.kind == "call":
                self._pool.submit(self._answer, *message.value)
            else:
                self._inbox.put(message)
        os._exit(0)

    def _serve(self, engine: Engine) -> None:
        while self._obeyed(engine):
            self._tell(engine, engine.step())
        engine.close()

    def _obeyed(self, engine: Engine) -> bool:
        """Does what was said meanwhile, and waits for something where nothing is to be done; False: close."""
        while not self._inbox.empty() or engine.free_slots == engine.info.slots:
            self._tell(engine, ())
            message = self._inbox.get()
            if message.kind == "close":
                return False
            if message.kind == "admit":
                self._received += len(message.value)
                engine.admit(message.value)
            elif message.kind == "cancel":
                engine.cancel(message.value)
        return True

    def _tell(self, engine: Engine, outcomes: Sequence[Outcome]) -> None:
        """What is finished, and how many windows the engine could have been given altogether by now."""
        admissible = self._received + engine.free_slots
        if outcomes or admissible != self._told:
            self._told = admissible
            self._wire.send("turn", ([_crossing(outcome) for outcome in outcomes], admissible))

    def _answer(self, call_id: int, name: str, arguments: Sequence[Any]) -> None:
        try:
            value, failure = self._calls[name](*arguments), None
        except Error as error:
            value, failure = None, portable(error)
        except Exception as error:
            log.exception("%s failed", name)
            value, failure = None, portable(error)
        self._wire.send("answer", (call_id, value, failure))


def calls_of(engine: Engine) -> Mapping[str, Callable[..., Any]]:
    """What the daemon may ask of this engine besides windows, by name; in threads of their own."""
    detector = getattr(engine, "detector", None)
    return {} if detector is None else {"detect": detector.run}


def _crossing(outcome: Outcome) -> Outcome:
    return replace(outcome, error=portable(outcome.error)) if isinstance(outcome, WindowFailure) else outcome
