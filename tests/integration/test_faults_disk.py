"""The disk fails, is full, is another user's, or holds unexpected files: this is detected, reported and repaired."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import HubRepo, LoopbackHub, whisper_files
from tests.support.mounts import mounted, resize, small
from tests.support.store import (
    FOLDER,
    NAME,
    assert_told,
    assert_well,
    copy_cache,
    error,
    offline,
    plain,
    run,
    tree,
    wanted,
)
from whisperd import errors
from whisperd.store.hub.failures import CURES
from whisperd.store.plan import CachePlan
from whisperd.store.reconcile import Report, reconcile
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings

OTHER_UID = 65534
LOOK_AND_RUN = """
import codecs, os, sys
from pathlib import Path
from whisperd import errors
from tests.support.store import store_settings
from whisperd.store.reconcile import reconcile, snapshots_without_network
from whisperd.reference import parse
from whisperd.store.sources import Wanted
uid = int(sys.argv[3])
codecs.lookup("ascii")
if uid != os.geteuid():  # after the imports: another user need not be able to read this checkout
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
settings = store_settings(cache_dir=Path(sys.argv[1]), endpoint=sys.argv[2])
wanted = [Wanted(name="org/model", source=parse("org/model"))]
print(len(snapshots_without_network(wanted, settings)))
try:
    reconcile(wanted, settings)
except errors.Error as error:
    print(error.code, error)
"""
NO_SYMLINKS = """
import ctypes, struct, sys
# a filter of the kernel: symlink and symlinkat end with EPERM, as on file systems that have no links
rules = [(0x20, 0, 0, 0), (0x15, 1, 0, 88), (0x15, 0, 1, 266), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
"""

Damage = Callable[[Path], None]


def blob(entry: str, change: Callable[[Path], object]) -> Damage:
    """Damage to the blob behind an entry of the snapshot."""
    return lambda snapshot: (change((snapshot / entry).resolve()), None)[1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


def into_file(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_bytes(b"{}")


def to_another_blob(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to((snapshot / "tokenizer.json").readlink())


def main_ref(change: Callable[[Path], object]) -> Damage:
    return lambda snapshot: (change(snapshot.parents[1] / "refs/main"), None)[1]


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def broken_tree(snapshot: Path) -> None:
    trees = snapshot.parents[1] / "trees"
    trees.mkdir(exist_ok=True)
    (trees / f"{snapshot.name}.json").write_text("{ nonsense")


def cache_file(name: str) -> Damage:
    return lambda snapshot: ((snapshot.parents[2] / name).write_text("{ nonsense"), None)[1]


CONFIG_BYTES = len(whisper_files(1)["config.json"])
MODEL_BYTES = len(whisper_files(1)["model.bin"])
ALL_BYTES = sum(len(data) for name, data in whisper_files(1).items() if name not in (".gitattributes", "README.md"))

# how the damage is done, what the plan calls it, and how many bytes the repair costs
DAMAGES: dict[str, tuple[Damage, str, int]] = {
    "bit flip": (blob("model.bin", flip), "model.bin wrong hash", MODEL_BYTES),
    "truncated blob": (blob("model.bin", lambda path: os.truncate(path, 10)), "model.bin wrong size", MODEL_BYTES),
    "empty blob": (blob("config.json", lambda path: os.truncate(path, 0)), "config.json wrong size", CONFIG_BYTES),
    "blob deleted, link dangling": (blob("config.json", Path.unlink), "config.json missing", CONFIG_BYTES),
    "entry missing": (lambda snapshot: (snapshot / "model.bin").unlink(), "model.bin unlinked", 0),
    "entry is a regular file": (into_file, "config.json not a link", CONFIG_BYTES),
    "entry leads to another blob": (to_another_blob, "config.json wrong link", 0),
    "snapshot deleted": (shutil.rmtree, "model.bin unlinked", 0),
    "repository deleted": (lambda snapshot: shutil.rmtree(snapshot.parents[1]), "model.bin missing", ALL_BYTES),
    "ref missing": (main_ref(Path.unlink), "ref does not name", 0),
    "ref empty": (main_ref(lambda path: os.truncate(path, 0)), "ref does not name", 0),
    "ref garbage": (main_ref(lambda path: path.write_bytes(b"\xff\xfe garbage")), "ref does not name", 0),
    "ref with a newline": (main_ref(lambda path: path.write_text(f"{path.read_text()}\n")), "ref does not name", 0),
    "ref names a commit that is not here": (main_ref(lambda path: path.write_text("f" * 40)), "ref does not name", 0),
    "ref is a directory": (main_ref(into_directory), "ref does not name", 0),
    "tree list of the library garbage": (broken_tree, "complete, verified", 0),
    "lock file garbage": (cache_file("whisperd.lock"), "complete, verified", 0),
    "stamps garbage": (cache_file(".whisperd/stamps.json"), "complete, verified", 0),
}


@pytest.mark.parametrize(("damage", "told", "cost_bytes"), DAMAGES.values(), ids=DAMAGES)
def test_damage(settings: Settings, filled: Path, damage: Damage, told: str, cost_bytes: int) -> None:
    """Damage is detected without the network, never served, and repaired with as few bytes as possible."""
    damage(filled)
    is_whole = all((filled / name).is_file() for name in ("config.json", "model.bin")) and "wrong" not in told
    assert offline(settings) == ({NAME: filled} if is_whole and "a link" not in told else {})
    report = run(settings)
    assert told in plan_lines(report.plan)[0]
    assert report.results[0].fetched_bytes == cost_bytes
    assert_well(report, settings, whisper_files(1))
    assert run(settings).results[0].outcome == "ok"


def test_damage_that_keeps_size_and_time(settings: Settings, filled: Path) -> None:
    """A file with unchanged size and time is trusted until --verify hashes it."""
    assert offline(settings) == {NAME: filled}
    path = (filled / "model.bin").resolve()
    found = path.stat()
    flip(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert run(settings).results[0].outcome == "ok"
    assert_well(run(replace(settings, verify=True)), settings, whisper_files(1))


# what plain snapshot_download calls success, and whether the damage is still there afterwards
PLAIN: dict[str, tuple[Damage, dict[str, Any]]] = {
    "bit flip": (DAMAGES["bit flip"][0], {}),
    "empty blob": (DAMAGES["empty blob"][0], {}),
    "entry is a regular file, under force": (into_file, {"force_download": True}),
}


@pytest.mark.parametrize(("damage", "options"), PLAIN.values(), ids=PLAIN)
def test_plain_snapshot_download_keeps_damage(
    hub: LoopbackHub, repo: HubRepo, plain_cache: Path, damage: Damage, options: dict[str, Any]
) -> None:
    """The library reports success and leaves the wrong bytes where they are."""
    snapshot = plain_cache / FOLDER / "snapshots" / repo.refs["main"]
    damage(snapshot)
    before = {name: (snapshot / name).read_bytes() for name in ("config.json", "model.bin")}
    assert before != {name: whisper_files(1)[name] for name in before}
    done = plain(plain_cache, hub.endpoint, **options)
    assert (done.path, done.error) == (snapshot, None)
    assert {name: (snapshot / name).read_bytes() for name in before} == before


@pytest.mark.usefixtures("repo")
def test_plain_snapshot_download_with_an_empty_ref(hub: LoopbackHub, plain_cache: Path, settings: Settings) -> None:
    """Offline the library returns the directory above all snapshots as success; whisperd repairs the ref for free."""
    os.truncate(plain_cache / FOLDER / "refs/main", 0)
    done = plain(plain_cache, hub.endpoint, local_files_only=True)
    assert done.path == plain_cache / FOLDER / "snapshots"
    copy_cache(plain_cache, settings.cache_dir)
    assert offline(settings) == {}
    report = run(settings)
    assert (report.exit_code, report.results[0].fetched_bytes) == (0, 0)
    assert plain(settings.cache_dir, hub.endpoint, local_files_only=True).path == report.snapshots[NAME]


def test_an_extra_file(settings: Settings, filled: Path) -> None:
    """An extra file beside those of a model is neither removed nor reported."""
    (filled / "notes.txt").write_text("mine")
    assert run(settings).results[0].outcome == "ok"
    assert (filled / "notes.txt").read_text() == "mine"


def run_after(settings: Settings, spoil: Callable[[], object]) -> Report:
    """A run in which something happens between the plan and the first byte."""

    def on_plan(_: CachePlan) -> None:
        spoil()

    return reconcile(wanted(NAME), settings, on_plan=on_plan)


def fill(directory: Path) -> None:
    """Fills the disk to the last byte."""
    with suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def fill_inodes(directory: Path) -> None:
    with suppress(OSError):
        for number in range(100_000):
            (directory / f"filler{number}").touch()


def clean(directory: Path) -> None:
    for path in directory.glob("filler*"):
        path.unlink()


TOO_SMALL = {
    "bytes": ("size=20m", "size=200m", "room for 0 B"),
    "inodes": ("nr_inodes=60", "nr_inodes=0", "inodes needed"),
}


@pytest.mark.parametrize(("options", "more", "cause"), TOO_SMALL.values(), ids=TOO_SMALL)
@pytest.mark.usefixtures("repo")
def test_a_disk_that_is_too_small(
    hub: LoopbackHub, settings: Settings, tmp_path: Path, options: str, more: str, cause: str
) -> None:
    """A model without enough space is not fetched; with more space the same run works."""
    with small(tmp_path / "disk", options):
        there = replace(settings, cache_dir=tmp_path / "disk/cache")
        report = run(there)
        assert isinstance(error(report), errors.DiskFull)
        assert_told(str(error(report)), errors.DiskFull, cause, settings)
        assert not any("/resolve/" in request for request in hub.requests)
        resize(tmp_path / "disk", more)
        assert_well(run(there), there, whisper_files(1))


@pytest.mark.parametrize("spoil", [fill, fill_inodes], ids=["bytes", "inodes"])
def test_a_disk_that_fills_up(
    repo: HubRepo, settings: Settings, caches: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """When the disk fills up in an update, the old snapshot serves and the branch names it."""
    disk = tmp_path / "disk"
    with small(disk, "size=100m,nr_inodes=1000"):
        copy_cache(caches / "whisperd", disk / "cache")
        there = replace(settings, cache_dir=disk / "cache", update=True)
        before = tree(there.cache_dir / FOLDER)
        files = whisper_files(2, size_bytes=3 << 20)
        repo.commit(files)
        report = run_after(there, lambda: spoil(disk))
        assert isinstance(error(report), errors.DiskFull), error(report)
        assert str(error(report)).startswith((f"{disk}/cache/", f"{NAME}@"))
        cause = f"(No space left on device|room for 0 B); {CURES[errors.DiskFull]}"
        assert re.search(cause, str(error(report)).replace(")", ""))
        assert tree(there.cache_dir / FOLDER) == before
        assert offline(there) == {NAME: report.results[0].path}
        clean(disk)
        assert_well(run(there), there, files)


def test_plain_snapshot_download_on_a_full_disk(hub: LoopbackHub, repo: HubRepo, caches: Path, tmp_path: Path) -> None:
    """The library moves the branch before the bytes come, so the copy that worked offline no longer does."""
    with small(tmp_path / "disk", "size=3m"):
        cache = tmp_path / "disk/cache"
        copy_cache(caches / "plain", cache)
        assert plain(cache, hub.endpoint, local_files_only=True).error is None
        repo.commit(whisper_files(2, size_bytes=4 << 20))
        assert plain(cache, hub.endpoint).errno == errno.ENOSPC
        assert plain(cache, hub.endpoint, local_files_only=True).error == "IncompleteSnapshotError"


@pytest.mark.usefixtures("repo")
def test_force_on_a_tight_disk(settings: Settings, caches: Path, tmp_path: Path) -> None:
    """Force keeps old and new files for a while: without room for both it is refused, and the old files serve."""
    disk = tmp_path / "disk"
    with small(disk, "size=64m"):
        copy_cache(caches / "whisperd", disk / "cache")
        there = replace(settings, cache_dir=disk / "cache", force=True)
        before = tree(there.cache_dir / FOLDER)
        report = run(there)
        assert isinstance(error(report), errors.DiskFull)
        assert (tree(there.cache_dir / FOLDER), list(offline(there))) == (before, [NAME])
        resize(disk, "size=200m")
        assert_well(run(there), there, whisper_files(1))


def test_read_only(hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path) -> None:
    """A complete read-only cache serves and can be checked; whatever must write is refused."""
    repo.commit(whisper_files(2))
    with mounted(settings.cache_dir, "--bind", "-o", "ro", str(settings.cache_dir)):
        before = tree(settings.cache_dir)
        assert offline(settings) == {NAME: filled}
        assert run(replace(settings, check=True)).exit_code == 0
        assert run(replace(settings, check=True, update=True)).exit_code == 3
        for changed in (replace(settings, update=True), replace(settings, force=True)):
            with pytest.raises(errors.CachePermissionError, match="Read-only file system; give this user write"):
                run(changed)
        assert plain(settings.cache_dir, hub.endpoint, force_download=True).errno == errno.EROFS
        assert tree(settings.cache_dir) == before
    assert_well(run(replace(settings, update=True)), settings, whisper_files(2))


@pytest.mark.usefixtures("repo")
def test_read_only_and_empty(hub: LoopbackHub, settings: Settings) -> None:
    """An empty read-only cache is refused before the Hub is asked."""
    with mounted(settings.cache_dir, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        assert offline(settings) == {}
        with pytest.raises(errors.CachePermissionError, match=str(settings.cache_dir)):
            run(settings)
    assert hub.requests == []
    assert_well(run(settings), settings, whisper_files(1))


@pytest.fixture
def as_other_user(hub: LoopbackHub) -> Callable[[Path], list[str]]:
    """Looks at a cache and reconciles it as a user without rights here; returns the lines of output."""
    if os.geteuid():
        pytest.skip("becoming another user needs root")

    def run_it(cache_dir: Path) -> list[str]:
        command = [sys.executable, "-c", LOOK_AND_RUN, str(cache_dir), hub.endpoint, str(OTHER_UID)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run_it


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user can enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_the_cache_of_another_user(
    as_other_user: Callable[[Path], list[str]], caches: Path, open_dir: Path, hub: LoopbackHub
) -> None:
    """Another user can serve from it, verified; changing it is refused, with the command that would work."""
    copy_cache(caches / "whisperd", open_dir / "cache")
    served, refused = as_other_user(open_dir / "cache")
    assert served == "1"
    assert refused.startswith(f"cache_permission {open_dir}/cache belongs to root")
    assert "sudo -u root whisperd reconcile" in refused
    assert hub.requests == []


def test_a_directory_that_cannot_be_written(
    as_other_user: Callable[[Path], list[str]], open_dir: Path, hub: LoopbackHub
) -> None:
    """A directory without write permission, or one that cannot be made, is refused with its path and the remedy."""
    (open_dir / "closed").mkdir(mode=0o555)
    os.chown(open_dir / "closed", OTHER_UID, OTHER_UID)
    for cache_dir in (open_dir / "closed", open_dir / "missing/cache"):
        served, refused = as_other_user(cache_dir)
        assert served == "0"
        assert refused.startswith("cache_permission ")
        assert str(cache_dir).removesuffix("/cache") in refused
        assert "Permission denied; give this user write access" in refused
    assert hub.requests == []


@pytest.mark.parametrize("inside", [".", "cache"], ids=["cache_dir is a file", "a parent is a file"])
@pytest.mark.usefixtures("repo")
def test_a_file_in_the_way(hub: LoopbackHub, settings: Settings, tmp_path: Path, inside: str) -> None:
    """A cache path that cannot be a directory is refused with the path before the Hub is asked."""
    (tmp_path / "file").touch()
    there = replace(settings, cache_dir=tmp_path / "file" / inside)
    with pytest.raises(errors.StoreError, match=f"{tmp_path / 'file'}.*: Not a directory; something is in the way"):
        run(there)
    assert hub.requests == []
    (tmp_path / "file").unlink()
    assert_well(run(there), there, whisper_files(1))


@pytest.mark.usefixtures("repo")
def test_blobs_is_a_file(settings: Settings) -> None:
    """A file that blocks a move into the cache is reported with its path."""
    blobs = settings.cache_dir / FOLDER / "blobs"
    blobs.parent.mkdir(parents=True)
    blobs.touch()
    report = run(settings)
    assert f"{blobs}: File exists; something is in the way" in str(error(report))
    assert offline(settings) == {}
    blobs.unlink()
    again = run(settings)
    assert_well(again, settings, whisper_files(1))
    assert again.results[0].fetched_bytes == 0  # what had arrived was kept


@pytest.mark.usefixtures("repo")
def test_a_cache_that_is_missing(settings: Settings, tmp_path: Path) -> None:
    """A missing cache is made, with its parents."""
    there = replace(settings, cache_dir=tmp_path / "a/b/c")
    assert_well(run(there), there, whisper_files(1))


@pytest.mark.usefixtures("repo")
def test_a_file_system_that_follows_no_links(hub: LoopbackHub, settings: Settings) -> None:
    """Broken links would make an empty model, so the cache is refused before the Hub is asked."""
    with (
        mounted(settings.cache_dir, "-t", "tmpfs", "-o", "nosymfollow", "tmpfs"),
        pytest.raises(errors.StoreError, match=r"no symbolic links.*; choose another cache_dir"),
    ):
        run(settings)
    assert hub.requests == []


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter names system calls by their numbers")
def test_a_file_system_without_links(hub: LoopbackHub, open_dir: Path) -> None:
    """A kernel that refuses to make links is reported as such."""
    done = subprocess.run(
        [sys.executable, "-c", NO_SYMLINKS + LOOK_AND_RUN, str(open_dir / "cache"), hub.endpoint, str(os.geteuid())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "store_error" in done.stdout, done.stderr
    assert "no symbolic links, which the cache needs; choose another cache_dir" in done.stdout
    assert hub.requests == []


@pytest.mark.usefixtures("repo")
def test_a_cache_that_was_filled_without_links(hub: LoopbackHub, settings: Settings) -> None:
    """Files in place of links are recognised and replaced."""
    assert plain(settings.cache_dir, hub.endpoint, environ={"HF_HUB_DISABLE_SYMLINKS": "1"}).error is None
    assert offline(settings) == {}
    report = run(settings)
    assert (report.results[0].outcome, "not a link" in plan_lines(report.plan)[0]) == ("repaired", True)
    assert report.exit_code == 0
    assert offline(settings) == {NAME: report.snapshots[NAME]}
    assert all(entry.is_symlink() for entry in report.snapshots[NAME].iterdir() if entry.suffix in {".bin", ".json"})
