"""Readiness and status describe what a client would get, also with a spool that was removed or is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.models import ready_state
from tests.support.mounts import small
from whisperd.daemon.leases import Leases
from whisperd.daemon.status import Status
from whisperd.errors import SpoolFull
from whisperd.serving.spool import Spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    directory = tmp_path / "spool"
    directory.mkdir()
    return Spool(directory, upload_bytes=10_000_000, budget_bytes=10_000_000)


def shown(spool: Spool) -> Status:
    return Status(ready_state('models = [{ repo = "path:/a", name = "a" }]'), Leases(), spool)


@contextmanager
def removed(directory: Path) -> Iterator[str]:
    directory.rmdir()
    yield "cannot be written (No such file or directory)"
    directory.mkdir()


@contextmanager
def full(directory: Path) -> Iterator[str]:
    with small(directory, "size=1m"):
        with (directory / "another file").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield "has no room left"


@contextmanager
def read_only(directory: Path) -> Iterator[str]:
    if not os.geteuid():
        pytest.skip("root may write everywhere")
    directory.chmod(0o500)
    yield "cannot be written"
    directory.chmod(0o700)


@pytest.mark.parametrize("spoil", [removed, full, read_only])
def test_a_spool_that_takes_no_upload(spool: Spool, spoil: object) -> None:
    """Readiness, status and systemd's line name the directory and the cause, until it is repaired."""
    assert callable(spoil)
    status = shown(spool)
    assert status.readiness().ready
    with spoil(spool.directory) as cause:
        readiness = status.readiness()
        assert not readiness.ready
        assert not readiness.draining
        assert readiness.retry_after_s > 1
        for text in (readiness.reason, *status.as_dict()["problems"], status.line()):
            assert f"the spool directory {spool.directory}" in text
            assert cause in text
        with pytest.raises(SpoolFull):
            spool.refuse_announced(1_000_000)
    assert status.readiness().ready
    assert status.as_dict()["problems"] == []
    assert status.line().startswith("serving")


def test_readiness_before_and_after(spool: Spool) -> None:
    """During the start the reason is the current step; during the stop no time to retry is given."""
    state = ready_state()
    state.phase, state.note = "starting", "loading a"
    status = Status(state, Leases(), spool)
    assert (status.readiness().ready, status.readiness().reason) == (False, "loading a")
    state.enter("stopping")
    assert status.readiness().draining
