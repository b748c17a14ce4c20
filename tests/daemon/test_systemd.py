"""What systemd gets: one true line, watchdog pings, and requests for more time only while bytes arrive."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.fakes import FakeEngine
from whisperd.config import ModelTable, load
from whisperd.daemon.leases import Leases
from whisperd.daemon.models import ModelInstance, ServedModel, ServedModels
from whisperd.daemon.state import State
from whisperd.daemon.status import Status
from whisperd.daemon.systemd import Supervision, is_alive
from whisperd.engine.base import DecodeRequest, EngineHealth, Hypothesis, Window
from whisperd.notify import Notifier
from whisperd.serving.spool import Spool
from whisperd.store.progress import Amount
from whisperd.store.reconcile import Progress
from whisperd.transcription.batcher import Batcher
from whisperd.transcription.model import LoadedModel


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(loaded=load(Path("/dev/null"), environ={}, cwd=tmp_path), cache_dir=str(tmp_path))


def served(model: LoadedModel) -> ServedModels:
    table = ModelTable(repo="path:/nowhere", name=model.name)
    instance = ModelInstance(model=model, snapshot=Path("/nowhere"))
    return ServedModels((ServedModel(table=table, snapshot=instance.snapshot, instance=instance),))


def shown(state: State, leases: Leases) -> Status:
    return Status(state, leases, Spool(Path(state.cache_dir), upload_bytes=1, budget_bytes=1))


def supervised(notifier: Notifier, state: State, leases: Leases | None = None, stall_s: float = 300) -> Supervision:
    found = leases or Leases()
    return Supervision(notifier, state, shown(state, found), found, engine_stall_s=stall_s)


def received(listener: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(listener.recv(4096).decode())
        except BlockingIOError:
            return messages


def fetched(done_bytes: int, name: str = "org/a") -> Progress:
    amount = Amount(done_bytes=done_bytes, total_bytes=2_000_000)
    return Progress(name=name, model=amount, run=amount)


HALF = ["STATUS=downloading org/a: 50 % of 2.0 MB", "EXTEND_TIMEOUT_USEC=150000000"]


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ([0], []),
        ([500_000], []),  # a value left by an earlier run
        ([500_000, 500_000], []),
        ([500_000, 1_000_000], HALF),
        ([1_000_000, 1_100_000, 1_000_000], ["STATUS=downloading org/a: 55 % of 2.0 MB", HALF[1]]),  # within a second
    ],
)
def test_more_time_only_while_bytes_arrive(
    systemd: socket.socket, state: State, done: list[int], expected: list[str]
) -> None:
    """A download that progresses extends the start timeout by two stalls and a margin; a stalled one does not."""
    with closing(Notifier({"NOTIFY_SOCKET": systemd.getsockname()})) as notifier:
        supervision = supervised(notifier, state)
        supervision.send()
        for done_bytes in done:
            supervision.note_progress(fetched(done_bytes))
    assert received(systemd) == ["STATUS=starting", *expected]


def test_every_download_is_on_the_line(systemd: socket.socket, state: State) -> None:
    """Concurrent downloads are shown together and removed together."""
    with closing(Notifier({"NOTIFY_SOCKET": systemd.getsockname()})) as notifier:
        supervision = supervised(notifier, state)
        supervision.note_progress(fetched(0, "org/b"))
        supervision.note_progress(fetched(0))
        supervision.note_progress(fetched(500_000))
        assert received(systemd)[0] == "STATUS=downloading org/b: 0 % of 2.0 MB, org/a: 25 % of 2.0 MB"
        supervision.clear_progress()
        supervision.send()
        assert received(systemd)[-1] == "STATUS=starting"


@contextmanager
def standing_still(tiny: LoadedModel, pid: int | None) -> Iterator[ServedModels]:
    """A model whose engine is inside a window that does not end."""
    gate, begun = threading.Event(), threading.Event()

    def stands_still(_: Window) -> Hypothesis:
        begun.set()
        assert gate.wait(60)
        raise AssertionError

    engine = FakeEngine(tiny.vocabulary, stands_still)
    engine.health = EngineHealth(pid=pid)
    batcher = Batcher(engine, name="x")
    batcher.ticket().submit(np.zeros(16, np.float32), DecodeRequest())
    assert begun.wait(60)
    yield served(replace(tiny, name="x", batcher=batcher))
    gate.set()
    batcher.close()


@pytest.mark.parametrize(("pid", "alive"), [(None, False), (4711, True)], ids=["inside", "own process"])
def test_an_engine_that_stands_still(tiny: LoadedModel, pid: int | None, alive: bool) -> None:
    """A hung engine inside the daemon stops the watchdog pings; one in its own process is replaced."""
    with standing_still(tiny, pid) as models:
        assert is_alive(models, 300)
        assert is_alive(models, 0) is alive


@pytest.mark.parametrize(("stall_s", "sent"), [(300, True), (0, False)])
def test_the_watchdog(systemd: socket.socket, state: State, tiny: LoadedModel, stall_s: float, sent: bool) -> None:
    """The watchdog message is sent as long as the engines make progress."""
    environ = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid())}
    leases = Leases()
    with standing_still(tiny, None) as models, closing(Notifier(environ)) as notifier:
        leases.swap(models)
        supervision = supervised(notifier, state, leases, stall_s)

        async def watch_once() -> None:
            watching = asyncio.create_task(supervision.watch())
            await asyncio.sleep(0)
            watching.cancel()

        asyncio.run(watch_once())
    leases.close()
    assert ("WATCHDOG=1" in received(systemd)) is sent


def test_the_line(state: State, tiny: LoadedModel) -> None:
    """The line has the current work, the model with its device, and the queue."""
    leases = Leases()
    leases.swap(served(replace(tiny, name="tiny")))
    status = shown(state, leases)
    state.enter("ready")
    assert status.line() == "serving tiny (cpu, int8_float32); idle, 0 done"
    for _ in range(2):
        state.admissions.enter(limit=2)
    state.totals.done = 7
    assert status.line() == "serving tiny (cpu, int8_float32); 2 running, 0 windows wait, 7 done"
    state.enter("reloading")
    state.downloads = "downloading org/a: 3 % of 9 MB"
    assert status.line().startswith("reloading: downloading org/a: 3 % of 9 MB; serving tiny (cpu, ")
    state.enter("ready")
    assert status.line().startswith("downloading org/a: 3 % of 9 MB; serving tiny (cpu, ")
    state.downloads = ""
    state.last_reload = {"ok": False, "at": 0.0, "error": "x" * 1000}
    line = status.line()
    assert line.startswith("last reload failed: xxx")
    assert "; serving tiny (cpu, " in line[:200]
