"""What systemd hears: one true line, and requests for more time only while bytes arrive."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.fakes import FakeEngine
from whisperd.config import ModelTable, load
from whisperd.daemon.leases import Leases
from whisperd.daemon.models import ModelInstance, ServedModel, ServedModels
from whisperd.daemon.service import State
from whisperd.daemon.systemd import Supervision, status_line
from whisperd.engine.base import DecodeRequest, EngineHealth, Hypothesis, Window
from whisperd.notify import Notifier
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
    ("told", "expected"),
    [
        ([0], []),
        ([500_000], []),  # an earlier run has left it
        ([500_000, 500_000], []),
        ([500_000, 1_000_000], HALF),
        ([1_000_000, 1_100_000, 1_000_000], ["STATUS=downloading org/a: 55 % of 2.0 MB", HALF[1]]),  # within a second
    ],
)
def test_more_time_only_while_bytes_arrive(
    systemd: socket.socket, state: State, told: list[int], expected: list[str]
) -> None:
    """A download that moves extends the time to start by two stalls and a margin; one that does not is silent."""
    with closing(Notifier({"NOTIFY_SOCKET": systemd.getsockname()})) as notifier:
        supervision = Supervision(notifier, state, Leases(), engine_stall_s=300)
        supervision.tell()
        for done_bytes in told:
            supervision.fetched(fetched(done_bytes))
    assert received(systemd) == ["STATUS=starting", *expected]


def test_every_download_is_on_the_line(systemd: socket.socket, state: State) -> None:
    """Downloads that go on beside each other are told together, and forgotten together."""
    with closing(Notifier({"NOTIFY_SOCKET": systemd.getsockname()})) as notifier:
        supervision = Supervision(notifier, state, Leases(), engine_stall_s=300)
        supervision.fetched(fetched(0, "org/b"))
        supervision.fetched(fetched(0))
        supervision.fetched(fetched(500_000))
        assert received(systemd)[0] == "STATUS=downloading org/b: 0 % of 2.0 MB, org/a: 25 % of 2.0 MB"
        supervision.fetching_ended()
        supervision.tell()
        assert received(systemd)[-1] == "STATUS=starting"


@pytest.mark.parametrize(("pid", "alive"), [(None, False), (4711, True)], ids=["inside", "own process"])
def test_who_is_restarted(
    systemd: socket.socket, state: State, tiny: LoadedModel, pid: int | None, alive: bool
) -> None:
    """An engine that stands still inside the daemon ends the sign of life; one in its own process is replaced."""
    gate, begun = threading.Event(), threading.Event()

    def stands_still(_: Window) -> Hypothesis:
        begun.set()
        assert gate.wait(60)
        raise AssertionError

    engine = FakeEngine(tiny.vocabulary, stands_still)
    engine.health = EngineHealth(pid=pid)
    batcher, leases = Batcher(engine, name="x"), Leases()
    leases.swap(served(replace(tiny, name="x", batcher=batcher)))
    with closing(Notifier({"NOTIFY_SOCKET": systemd.getsockname()})) as notifier:
        supervision = Supervision(notifier, state, leases, engine_stall_s=0.0)
        batcher.ticket().submit(np.zeros(16, np.float32), DecodeRequest())
        assert begun.wait(60)
        assert supervision._alive() is alive
    gate.set()
    leases.close()


def test_the_line(state: State, tiny: LoadedModel) -> None:
    """What goes on, the model with its device, the queue."""
    models = served(replace(tiny, name="tiny"))
    state.become("ready")
    assert status_line(state, models) == "serving tiny (cpu, int8_float32); idle, 0 done"
    for _ in range(2):
        state.backlog.enter(limit=2)
    state.requests_done = 7
    assert status_line(state, models) == "serving tiny (cpu, int8_float32); 2 running, 0 windows wait, 7 done"
    state.become("reloading")
    state.downloads = "downloading org/a: 3 % of 9 MB"
    assert status_line(state, models).startswith("reloading: downloading org/a: 3 % of 9 MB; serving tiny (cpu, ")
    state.become("ready")
    assert status_line(state, models).startswith("downloading org/a: 3 % of 9 MB; serving tiny (cpu, ")
    state.downloads = ""
    state.last_reload = {"ok": False, "error": "x" * 1000}
    line = status_line(state, models)
    assert line.startswith("last reload failed: xxx")
    assert "; serving tiny (cpu, " in line[:200]
