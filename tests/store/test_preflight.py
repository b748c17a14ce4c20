"""Whether a cache can be used, and by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fake_origin import FakeOrigin
from tests.support.store import store_settings
from whisperd import errors
from whisperd.reference import HubSource, parse
from whisperd.store.plan import ModelState, RemoteFile, Resolved, Room, plan
from whisperd.store.preflight import one_writer, preflight
from whisperd.store.reconcile import Report, reconcile
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted

NOBODY = 65534
FILES = tuple(RemoteFile(path=f"f{number}", size_bytes=100, hash=str(number) * 40) for number in range(4))
NEW = ModelState(name="m", source=HubSource(repo_id="o/n"), target=Resolved(commit="a" * 40, files=FILES))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: works as two users")


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    for seed, name in enumerate(origin.repos):
        origin.commit(name, "main", seed)
    return origin


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return store_settings(cache_dir=tmp_path / "cache", endpoint="")


def run(origin: FakeOrigin, settings: Settings, *references: str) -> Report:
    return reconcile([Wanted(name=name, source=parse(name)) for name in references], settings, origin=origin)


@pytest.mark.parametrize(
    ("room", "reason"),
    [
        (
            Room(free_bytes=399),
            "disk full: 400 B to fetch, room for 399 B; free some space, or choose another cache_dir",
        ),
        (Room(free_inodes=11), "disk full: 12 inodes needed, 11 free; free some space, or choose another cache_dir"),
        (Room(quota_bytes=399), "over max_cache_bytes: 400 B to fetch, 399 B left; raise it, or --prune"),
        (Room(free_bytes=400, free_inodes=12, quota_bytes=400), ""),
        (Room(), ""),
    ],
)
def test_free_space(room: Room, reason: str) -> None:
    """Bytes, inodes and the quota are checked before the first byte; each refusal has its numbers."""
    (action,) = plan([NEW], room=room).actions
    assert (action.kind, action.reason if reason else "") == ("blocked" if reason else "download", reason)


def test_parts_need_no_more_room() -> None:
    """Parts of an earlier run count neither as bytes to fetch nor as space to find."""
    (action,) = plan([replace(NEW, part_bytes={"f0": 60, "f1": 1000})], room=Room(free_bytes=240)).actions
    assert (action.kind, action.bytes, action.total_bytes, action.part_bytes) == ("download", 240, 400, 160)
    lines = plan_lines(plan([replace(NEW, part_bytes={"f0": 60})]))
    assert lines[0].endswith("4 files, 340 B (60 B of it are here from before)")


def test_the_quota(origin: FakeOrigin, settings: Settings) -> None:
    """A model over the limit is refused by name, the one within it is fetched, and pruning makes room."""
    small = replace(settings, max_cache_bytes=1500)
    report = run(origin, small, "org/a", "org/b")
    assert [result.outcome for result in report.results] == ["downloaded", "failed"]
    assert "over max_cache_bytes" in str(report.results[1].error)
    assert run(origin, replace(small, prune=True), "org/a").exit_code == 0
    assert run(origin, small, "org/b").exit_code == 1
    assert run(origin, replace(settings, prune=True), "org/b").exit_code == 0
    assert run(origin, small, "org/b").exit_code == 0


def test_who_holds_the_lock(settings: Settings) -> None:
    """A second writer gets the holder's process and host; a crash leaves no lock behind."""
    preflight(settings.cache_dir)
    code = (
        "import os, sys, pathlib\n"
        "from whisperd.store.preflight import one_writer\n"
        "with one_writer(pathlib.Path(sys.argv[1])):\n"
        "    print(os.getpid(), flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(settings.cache_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = holder.stdout.readline().strip()
        with (
            pytest.raises(errors.CacheBusy, match=rf"pid {pid} on {os.uname().nodename}"),
            one_writer(settings.cache_dir),
        ):
            pass
        holder.kill()
    with one_writer(settings.cache_dir):
        found = json.loads((settings.cache_dir / ".whisperd/lock").read_text())
        assert found["pid"] == os.getpid()


@needs_root
def test_a_cache_of_another_user(settings: Settings, origin: FakeOrigin) -> None:
    """Another user's cache is refused, with the command for its owner; looking at it is allowed."""
    settings.cache_dir.mkdir()
    os.chown(settings.cache_dir, NOBODY, NOBODY)
    with pytest.raises(errors.CachePermissionError, match="sudo -u nobody whisperd reconcile") as caught:
        run(origin, settings, "org/a")
    assert caught.value.exit_code == 77
    assert run(origin, replace(settings, check=True), "org/a").exit_code == 3


@needs_root
def test_root_becomes_the_owner(settings: Settings, tmp_path: Path) -> None:
    """What root makes in a cache of another user belongs to that user."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and directory.stat().st_mode & 0o7 == 0:
            directory.chmod(0o755)
    settings.cache_dir.mkdir()
    os.chown(settings.cache_dir, NOBODY, NOBODY)
    code = (
        "import sys, pathlib\n"
        "from whisperd.store.preflight import become_owner, preflight\n"
        "cache = pathlib.Path(sys.argv[1])\n"
        "become_owner(cache)\n"
        "preflight(cache)"
    )
    subprocess.run([sys.executable, "-c", code, str(settings.cache_dir)], check=True)
    assert (settings.cache_dir / ".whisperd").stat().st_uid == NOBODY
