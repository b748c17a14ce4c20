"""Large files at a xet store that does not work come over plain HTTP, as whisperd always fetches."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.loopback_hub import HubRepo, LoopbackHub, whisper_files
from tests.support.store import assert_well, plain, run
from whisperd.store.settings import Settings

DEAD_PORT = 9
# without these the library waits four minutes for a store that does not answer
IMPATIENT = {
    "HF_HUB_DISABLE_XET": "0",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "1s",
    "HF_XET_CLIENT_READ_TIMEOUT": "2s",
}

Arrange = Callable[[LoopbackHub], None]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


FAULTS: dict[str, dict[str, int] | None] = {
    "CAS refused": None,
    "CAS accepts and never answers": None,
    "token route 500": {"status": 500},
    "token route 404": {"status": 404},
}


@pytest.fixture(params=FAULTS)
def xet_hub(hub: LoopbackHub, repo: HubRepo, silent_port: int, request: pytest.FixtureRequest) -> LoopbackHub:
    """A Hub that sends its clients to a xet store, which does not work."""
    assert repo.refs
    hub.xet_port = silent_port if "never answers" in request.param else DEAD_PORT
    if what := FAULTS[request.param]:
        hub.fault("/xet-read-token/", **what)
    return hub


def test_a_broken_xet_store(xet_hub: LoopbackHub, settings: Settings) -> None:
    """Xet is not used, so it cannot hang: not one request for its token is made."""
    assert_well(run(settings), settings, whisper_files(1))
    assert not any("xet-read-token" in request for request in xet_hub.requests)


@pytest.mark.usefixtures("repo")
def test_plain_snapshot_download_with_a_broken_xet_store(hub: LoopbackHub, tmp_path: Path) -> None:
    """The library does not fall back to HTTP: after its retries it raises an internal exception."""
    hub.xet_port = DEAD_PORT
    done = plain(tmp_path / "cache", hub.endpoint, environ=IMPATIENT)
    assert done.error == "RuntimeError"
    assert any("xet-read-token" in request for request in hub.requests)


@pytest.mark.usefixtures("repo")
def test_a_home_that_cannot_be_written(hub: LoopbackHub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's state is kept beside the cache, so HOME and HF_HOME do not matter."""
    hub.xet_port = DEAD_PORT
    for name in ("HOME", "HF_HOME", "HF_XET_CACHE"):
        monkeypatch.setenv(name, "/proc/1/nowhere")
    assert_well(run(settings), settings, whisper_files(1))
