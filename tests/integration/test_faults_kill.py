"""Processes that are stopped, killed, or run twice leave nothing half done, and what has arrived is used."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.daemon import clean_environ, write_config
from tests.support.loopback_hub import HubRepo, LoopbackHub, whisper_files
from tests.support.store import (
    FOLDER,
    NAME,
    assert_well,
    error,
    offline,
    plain,
    plain_command,
    plain_environ,
    run,
    tree,
)
from tests.support.wait import until
from whisperd import errors
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings

MIB = 1 << 20
LARGE_BYTES = 64 * MIB
ENOUGH = 0.9
LIMIT_S = 1.0


@contextmanager
def reconciling(settings: Settings, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """``whisperd reconcile`` in a process of its own, on the cache of ``settings``."""
    directory = settings.cache_dir.parent
    write_config(directory, f'models = ["{NAME}"]\n[reconcile]\nendpoint = "{settings.endpoint}"')
    process = subprocess.Popen(
        [sys.executable, "-m", "whisperd", "reconcile", "-c", str(directory / "whisperd.toml"), *flags],
        env=clean_environ(directory, {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie does not count."""
    return [pid for pid in pids if (path := Path(f"/proc/{pid}/stat")).exists() and ") Z " not in path.read_text()]


def staged_bytes(settings: Settings) -> int:
    return sum(path.stat().st_size for path in (settings.cache_dir / ".whisperd/staging").rglob("*") if path.is_file())


MOMENTS = {
    "asked, no answer": ("/revision/", {"silent": True}),
    "download stalled": ("GET /cdn/", {"stall_at": MIB}),
    "download slow": ("GET /cdn/", {"rate_bytes_per_s": 500_000}),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(("match", "what"), MOMENTS.values(), ids=MOMENTS)
def test_interrupted(
    hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path,
    match: str, what: dict[str, object], number: int,
) -> None:  # fmt: skip
    """The command ends within a second, leaves nothing broken and no process; the next run completes the work."""
    files = whisper_files(2, size_bytes=3 * MIB)
    repo.commit(files)
    before = tree(settings.cache_dir / FOLDER)
    hub.fault(match, **what)
    with reconciling(settings, "--update") as process:
        until(lambda: any(re.search(match, request) for request in hub.requests))
        helpers = children(process.pid)
        process.send_signal(number)
        started_s = time.monotonic()
        output, told = process.communicate(timeout=30)
        took_s = time.monotonic() - started_s
    sys.stdout.write(f"ended {took_s:.3f} s after the signal\n")
    assert took_s < LIMIT_S
    assert (process.returncode, bool(helpers), alive(helpers)) == (errors.Cancelled.exit_code, True, [])
    assert "cancelled" in output + told
    assert tree(settings.cache_dir / FOLDER) == before
    assert offline(settings) == {NAME: filled}
    hub.faults.clear()
    assert_well(run(replace(settings, update=True)), settings, files)


@pytest.fixture
def large(hub: LoopbackHub) -> dict[str, bytes]:
    """A repository with one large file, on a Hub that takes about two seconds to send it."""
    files = whisper_files(3, size_bytes=LARGE_BYTES)
    hub.add(NAME, files)
    hub.fault("GET /cdn/", rate_bytes_per_s=LARGE_BYTES / 2)
    return files


def test_killed_at_ninety_percent(hub: LoopbackHub, large: dict[str, bytes], settings: Settings) -> None:
    """SIGKILL ends the fetching process too; the next run fetches what is missing and little more."""
    with reconciling(settings) as process:
        until(lambda: staged_bytes(settings) > ENOUGH * LARGE_BYTES)
        helpers = children(process.pid)
        process.kill()
        process.wait()
        gone_s = until(lambda: not alive(helpers), patience_s=5)
    assert helpers
    assert offline(settings) == {}
    assert not any(settings.cache_dir.glob("models--*"))
    missing_bytes = LARGE_BYTES - staged_bytes(settings)
    hub.faults.clear()
    hub.sent_bytes = 0
    assert_well(run(settings), settings, large)
    sys.stdout.write(f"after a kill {hub.sent_bytes} of {LARGE_BYTES} bytes were sent; gone in {gone_s:.3f} s\n")
    assert hub.sent_bytes <= missing_bytes + MIB
    assert hub.sent_bytes < 0.15 * LARGE_BYTES


def test_plain_snapshot_download_killed_at_ninety_percent(
    hub: LoopbackHub, large: dict[str, bytes], tmp_path: Path
) -> None:
    """The library starts over, keeps the broken part for ever, and has moved the branch already."""
    cache = tmp_path / "plain"

    def parts() -> list[int]:
        with suppress(FileNotFoundError):  # small ones come and go
            return [path.stat().st_size for path in (cache / FOLDER / "blobs").glob("*.incomplete")]
        return []

    process = subprocess.Popen(plain_command(cache, endpoint=hub.endpoint), env=plain_environ(cache))
    try:
        until(lambda: sum(parts()) > ENOUGH * LARGE_BYTES)
    finally:
        process.kill()
        process.wait()
    assert (cache / FOLDER / "refs/main").read_text() == hub.repos[NAME].refs["main"]
    assert plain(cache, hub.endpoint, local_files_only=True).error == "IncompleteSnapshotError"
    hub.faults.clear()
    hub.sent_bytes = 0
    done = plain(cache, hub.endpoint)
    sys.stdout.write(f"after a kill of the plain library {hub.sent_bytes} of {LARGE_BYTES} bytes were sent\n")
    assert done.path is not None
    assert hub.sent_bytes >= LARGE_BYTES
    assert [size_bytes > ENOUGH * LARGE_BYTES for size_bytes in parts()] == [True]
    assert (done.path / "model.bin").read_bytes() == large["model.bin"]


def test_plain_snapshot_download_killed_in_an_update(
    hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path
) -> None:
    """A killed update has moved the branch: the working copy is out of reach offline until whisperd has run."""
    cache = settings.cache_dir
    repo.commit(whisper_files(2, size_bytes=3 * MIB))
    hub.fault("GET /cdn/", stall_at=MIB)
    process = subprocess.Popen(plain_command(cache, endpoint=hub.endpoint), env=plain_environ(cache))
    try:
        until(
            lambda: (cache / FOLDER / "snapshots" / repo.refs["main"] / "config.json").exists() and hub.stalled.is_set()
        )
    finally:
        process.kill()
        process.wait()
    assert plain(cache, hub.endpoint, local_files_only=True).error == "IncompleteSnapshotError"
    assert offline(settings) == {NAME: filled}
    report = run(settings)
    assert "the ref does not name the commit" in plan_lines(report.plan)[0]
    assert report.results[0].fetched_bytes == 0
    assert plain(cache, hub.endpoint, local_files_only=True).path == filled


def test_killed_in_an_update(hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path) -> None:
    """A killed update has changed nothing that is visible, to other tools either; no lock is left behind."""
    files = whisper_files(2, size_bytes=3 * MIB)
    repo.commit(files)
    before = tree(settings.cache_dir / FOLDER)
    hub.fault("GET /cdn/", stall_at=MIB)
    with reconciling(settings, "--update") as process:
        assert hub.stalled.wait(30)
        process.kill()
        process.wait()
    assert tree(settings.cache_dir / FOLDER) == before
    assert offline(settings) == {NAME: filled}
    assert plain(settings.cache_dir, hub.endpoint, local_files_only=True).path == filled
    hub.faults.clear()
    assert_well(run(replace(settings, update=True)), settings, files)


def test_the_helper_is_killed(hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path) -> None:
    """When the fetching process is killed, as for memory, the run fails with the reason, and the next one continues."""
    files = whisper_files(2, size_bytes=3 * MIB)
    repo.commit(files)
    hub.fault("GET /cdn/", stall_at=2 * MIB)
    with reconciling(settings, "--update") as process:
        assert hub.stalled.wait(30)
        until(lambda: staged_bytes(settings) > MIB)
        (helper,) = children(process.pid)
        os.kill(helper, signal.SIGKILL)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"{NAME}: the process that talks to the Hub was killed (SIGKILL): out of memory?; run it again" in output
    assert offline(settings) == {NAME: filled}
    hub.faults.clear()
    hub.sent_bytes = 0
    assert_well(run(replace(settings, update=True)), settings, files)
    assert hub.sent_bytes <= 2 * MIB


def test_two_at_once(hub: LoopbackHub, settings: Settings) -> None:
    """With --no-wait the second one names the process that works on the cache and ends at once; also with --force."""
    files = whisper_files(1, size_bytes=MIB)
    hub.add(NAME, files)
    for flags in ((), ("--force",)):
        slow = hub.fault("GET /cdn/", stall_at=1000, times=1)
        hub.stalled.clear()
        with reconciling(settings, *flags) as first:
            assert hub.stalled.wait(30)
            with reconciling(settings, "--no-wait", *flags) as second:
                _, told = second.communicate(timeout=30)
            assert (second.returncode, slow.times) == (errors.CacheBusy.exit_code, 0)
            assert f"another reconcile (pid {first.pid} on " in told
            first.kill()
        assert_well(run(replace(settings, force=bool(flags))), settings, files)


def test_cleaned_by_another_tool_meanwhile(hub: LoopbackHub, settings: Settings, filled: Path) -> None:
    """``hf cache prune`` in the middle of a download harms neither the download nor a pinned model."""
    files = whisper_files(4, size_bytes=3 * MIB)
    pinned = filled.name
    commit = hub.repos[NAME].commit(files, branch="other")
    hub.fault("GET /cdn/", times=1, stall_at=2 * MIB)

    def prune() -> None:
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", "cache", "prune", "-y"]
        done = subprocess.run(
            [*command, "--cache-dir", str(settings.cache_dir)],
            env=plain_environ(settings.cache_dir),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    assert run(settings, f"{NAME}@{pinned}").exit_code == 0
    (settings.cache_dir / FOLDER / "refs/main").unlink()  # only whisperd's own ref holds the pinned commit now
    with reconciling(settings, "-m", f"{NAME}@{commit}") as process:
        assert hub.stalled.wait(30)
        prune()
        hub.closing.set()  # the stalled connection ends
        output, told = process.communicate(timeout=60)
    assert process.returncode == 0, output + told
    prune()
    for kept in (pinned, commit):
        assert run(settings, f"{NAME}@{kept}").results[0].outcome == "ok"
    with pytest.raises(AssertionError):
        error(run(settings, f"{NAME}@{commit}"))
