"""An engine in its own process: what it inherits, how its exit is detected, and that it never outlives the daemon."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.engine.test_contract import drain
from tests.support import openers
from whisperd.engine.base import DecodeRequest, Hypothesis, Window
from whisperd.engine.process import ChildEngine
from whisperd.errors import EngineError, OutOfMemory, SourceError
from whisperd.metrics import ModelMeter
from whisperd.speech.units import Samples

PATIENCE_S = 60.0


@pytest.fixture
def echo() -> Iterator[ChildEngine]:
    engine = ChildEngine(openers.echo, stall_timeout_s=PATIENCE_S)
    yield engine
    engine.close()


def window(key: int, samples: Samples) -> Window:
    return Window(id=key, samples=samples, request=DecodeRequest())


def ones(n_samples: int) -> Samples:
    return np.ones(n_samples, np.float32)


def pid_of(engine: ChildEngine) -> int:
    assert engine.health.pid is not None
    return engine.health.pid


def alive(pid: int) -> bool:
    """A zombie counts as stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def until_dead(pid: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} lives on"
        os.sched_yield()


def step_until_the_end(engine: ChildEngine) -> EngineError:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            engine.step()
        except EngineError as error:
            return error
    raise AssertionError("it did not end")


def test_samples_arrive_as_they_were(echo: ChildEngine) -> None:
    """Whole windows, views of larger arrays and strided ones: the sums are right."""
    long = np.arange(1_000_000, dtype=np.float32) % 7
    pieces = [long[:480_000], long[1000:1500], long[::3], np.zeros(1, np.float32)]
    echo.admit([window(key, piece) for key, piece in enumerate(pieces)])
    found = drain(echo, len(pieces))
    tokens = [outcome.tokens for _, outcome in sorted(found.items()) if isinstance(outcome, Hypothesis)]
    assert tokens == [(len(piece), int(piece.sum())) for piece in pieces]


def test_what_it_inherits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither systemd's variables nor the daemon's sockets are inherited; only stderr, its socket and the lifeline."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        engine = ChildEngine(openers.echo, stall_timeout_s=PATIENCE_S)
        try:
            engine.admit([window(1, ones(5))])
            outcome = drain(engine, 1)[1]
            assert isinstance(outcome, Hypothesis)
            assert outcome.language == "en", "NOTIFY_SOCKET was inherited"
            links = [str(path.readlink()) for path in Path(f"/proc/{pid_of(engine)}/fd").iterdir()]
            assert str(tmp_path / "open") not in links
            assert sum(link.startswith("socket:") for link in links) == 1
        finally:
            engine.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_for_the_daemon(echo: ChildEngine, number: int) -> None:
    """A terminal's Ctrl-C and a stop of the whole group do not end the engine while the daemon needs it."""
    os.kill(pid_of(echo), number)
    echo.admit([window(1, ones(5))])
    assert isinstance(drain(echo, 1)[1], Hypothesis)


def test_close_ends_the_process(echo: ChildEngine) -> None:
    """No process remains, and closing again has no effect."""
    pid = pid_of(echo)
    echo.close()
    assert not alive(pid)
    echo.close()


def test_an_exit_is_noticed_while_idle(echo: ChildEngine) -> None:
    """The callback is called at once, and ``step`` reports how the process ended."""
    told = threading.Event()
    echo.on_wake(told.set)
    os.kill(pid_of(echo), signal.SIGKILL)
    assert told.wait(PATIENCE_S)
    with pytest.raises(EngineError, match=r"was killed \(SIGKILL\): out of memory\?"):
        echo.step()
    with pytest.raises(EngineError, match="SIGKILL"):
        echo.admit([window(1, ones(5))])


def test_an_exit_during_a_window(echo: ChildEngine) -> None:
    """Windows that were finished before the exit come out first."""
    echo.admit([window(1, ones(5))])
    assert list(drain(echo, 1)) == [1]
    echo.admit([window(2, ones(9))])
    assert "SIGKILL" in str(step_until_the_end(echo))


def test_a_hung_process_is_killed() -> None:
    """A process that returns nothing, or that reads nothing, is killed after the timeout."""
    for n_samples in (19, 5_000_000):
        engine = ChildEngine(openers.echo, stall_timeout_s=0.5)
        pid = pid_of(engine)
        try:
            if n_samples != 19:
                os.kill(pid, signal.SIGSTOP)
                with pytest.raises(EngineError, match=r"reads nothing for 0\.5 s \(engine\.stall_timeout_s\)"):
                    engine.admit([window(1, ones(n_samples))])
            else:
                engine.admit([window(1, ones(n_samples))])
                assert "sends nothing for 0.5 s" in str(step_until_the_end(engine))
            assert not alive(pid)
        finally:
            engine.close()


@pytest.mark.parametrize(
    ("opener", "kind", "words"),
    [
        (openers.no_memory, OutOfMemory, "no room for the model"),
        (openers.no_model, SourceError, "this is no model"),
        (openers.no_luck, EngineError, "a surprise"),
        (openers.no_time, EngineError, "SIGKILL"),
    ],
)
def test_errors_cross(opener: object, kind: type[Exception], words: str) -> None:
    """An error that keeps the engine from opening is raised here with the same class; the process is gone."""
    with pytest.raises(kind, match=words) as caught:
        ChildEngine(opener, stall_timeout_s=PATIENCE_S)  # type: ignore[arg-type]
    assert type(caught.value) is kind


def test_its_log_is_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A record that is logged there is logged here, under the same name and with its traceback."""
    with pytest.raises(EngineError), caplog.at_level(logging.INFO, logger="whisperd"):
        ChildEngine(openers.no_luck, stall_timeout_s=PATIENCE_S)
    (record,) = [record for record in caplog.records if record.name == "whisperd.engine.process.worker"]
    assert record.levelno == logging.ERROR
    assert "ValueError: a surprise" in record.getMessage()


class Batches(ModelMeter):
    def __init__(self) -> None:
        self.windows = 0

    def observe_batch(self, n_windows: int, duration_s: float) -> None:
        assert duration_s > 0
        self.windows += n_windows


def test_calls(echo: ChildEngine) -> None:
    """The detector of an engine is called from any thread, beside windows; its errors are passed on too."""
    assert echo.detector is not None
    found = echo.detector.run(ones(3), ones(2), ones(1))
    assert [array.tolist() for array in found] == [[2, 2, 2], [2, 2], [2]]
    with pytest.raises(OutOfMemory, match="nothing to double"):
        echo.detector.run(ones(0), ones(2), ones(1))
    os.kill(pid_of(echo), signal.SIGKILL)
    until_dead(pid_of(echo))
    with pytest.raises(EngineError, match="SIGKILL"):
        echo.detector.run(ones(3), ones(2), ones(1))


def test_the_meter_is_ours(snapshot: Path) -> None:
    """Batches of a real engine are counted here."""
    meter = Batches()
    engine = ChildEngine(partial(openers.ct2, snapshot), stall_timeout_s=PATIENCE_S, meter=meter)
    try:
        engine.admit([window(1, ones(16000))])
        drain(engine, 1)
        assert meter.windows == 1
    finally:
        engine.close()


PARENT = """
import os, signal, sys
from tests.support import openers
from tests.engine.test_process import ones, pid_of, window
from whisperd.engine.process import ChildEngine
engine = ChildEngine(openers.echo, stall_timeout_s=60)
print(pid_of(engine), flush=True)
if sys.argv[1] == "stuck":
    engine.admit([window(1, ones(29))])
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "stuck"])
def test_it_ends_with_the_daemon(state: str) -> None:
    """After ``kill -9`` of the parent the process is gone, even if it is stuck."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PARENT, state]
    with subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if state == "stuck":
            until_computing(pid)
        parent.kill()
        until_dead(pid)


def until_computing(pid: int) -> None:
    """Runs nothing but the call in which it is stuck."""
    deadline_s = time.monotonic() + PATIENCE_S
    begun = ticks(pid)
    while ticks(pid) < begun + 20:
        assert time.monotonic() < deadline_s
        os.sched_yield()


def ticks(pid: int) -> int:
    """CPU time of a process, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11])
