"""Caches as others leave them: links to other places, other tools at work, other disks, odd files in staging."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.loopback_hub import HubRepo, LoopbackHub, whisper_files
from tests.support.store import (
    FOLDER,
    NAME,
    assert_well,
    copy_cache,
    error,
    model_bytes,
    offline,
    plain,
    plain_environ,
    ref,
    run,
    tree,
    wanted,
)  # fmt: skip
from whisperd import errors
from whisperd.store.progress import Progress
from whisperd.store.reconcile import reconcile
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings

MIB = 1 << 20
HUGGING_FACE = {
    "config.json": b'{"model_type": "whisper"}',
    "generation_config.json": b"{}",
    "preprocessor_config.json": b'{"a": 1}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": bytes(1000),
}


def hf_cache(settings: Settings, *arguments: str) -> str:
    """huggingface_hub's own command on the cache."""
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", "cache", *arguments, "--cache-dir", str(settings.cache_dir)],
        env=plain_environ(settings.cache_dir), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_readable_by_the_library(settings: Settings) -> None:
    """``hf cache ls`` leaves out a whole repository when it finds something unexpected in it."""
    from huggingface_hub import scan_cache_dir

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = scan_cache_dir(settings.cache_dir)
    assert [repo.repo_id for repo in found.repos] == [NAME]
    assert not any(NAME.replace("/", "--") in str(warning) for warning in found.warnings)


# --- where the links lead


def to_another_cache(snapshot: Path, elsewhere: Path) -> None:
    """The name is right and the file exists, but its bytes are wrong."""
    name = (snapshot / "model.bin").readlink().name
    elsewhere.mkdir()
    (elsewhere / name).write_bytes(b"other bytes")
    relink(snapshot, elsewhere / name)


def to_nowhere(snapshot: Path, elsewhere: Path) -> None:
    """As in a cache that was moved with its absolute links."""
    relink(snapshot, elsewhere / (snapshot / "model.bin").readlink().name)


def relink(snapshot: Path, target: Path) -> None:
    (snapshot / "model.bin").unlink()
    (snapshot / "model.bin").symlink_to(target)


def as_a_directory(snapshot: Path, elsewhere: Path) -> None:
    """The snapshot itself is a link to one of another cache."""
    shutil.copytree(snapshot, elsewhere, symlinks=True)
    shutil.rmtree(snapshot)
    snapshot.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [to_another_cache, to_nowhere, as_a_directory])
def test_a_link_that_leads_elsewhere(
    settings: Settings, filled: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    """A link is judged by its target, not by its name; it is replaced, and the target stays."""
    damage(filled, tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere") if (tmp_path / "elsewhere").exists() else {}
    assert offline(settings) == {}
    report = run(settings)
    assert (report.results[0].outcome, report.results[0].fetched_bytes) == ("repaired", 0), plan_lines(report.plan)
    assert_well(run(settings), settings, whisper_files(1))
    assert (tree(tmp_path / "elsewhere") if before else {}) == before


def test_files_that_vanish_while_others_are_fetched(repo: HubRepo, settings: Settings, filled: Path) -> None:
    """A model that was complete in the plan is checked once more before the branch moves."""
    files = {**whisper_files(1), "config.json": b'{"new": 1}'}
    repo.commit(files)
    vanished: list[Path] = []

    def remove(_: Progress) -> None:
        if not vanished:
            vanished.append((filled / "model.bin").resolve())
            vanished[0].unlink()

    report = reconcile(wanted(NAME), replace(settings, update=True), on_progress=remove)
    assert vanished
    assert_well(report, settings, files)


def test_a_model_that_vanishes_while_another_is_fetched(hub: LoopbackHub, settings: Settings, filled: Path) -> None:
    """A model with nothing to do exists at the end, or is not reported as present."""
    hub.add("org/other", whisper_files(5))

    def remove(_: Progress) -> None:
        shutil.rmtree(filled.parents[1], ignore_errors=True)

    report = reconcile([*wanted(NAME), *wanted("org/other")], replace(settings, parallel=1), on_progress=remove)
    for result in report.results:
        assert (result.outcome == "failed") == (result.path is None)
        assert result.path is None or all((result.path / name).exists() for name in ("model.bin", "config.json"))
    again = reconcile([*wanted(NAME), *wanted("org/other")], settings)
    assert again.exit_code == 0


@pytest.mark.parametrize("has_tree", [True, False], ids=["tree list", "no tree list"])
def test_an_interrupted_download_of_another_tool(hub: LoopbackHub, settings: Settings, has_tree: bool) -> None:
    """A file that the commit has and the engine uses is required, also when everything else looks complete."""
    hub.add(NAME, HUGGING_FACE)
    snapshot = plain(settings.cache_dir, hub.endpoint).path
    assert snapshot is not None
    (snapshot / "generation_config.json").resolve().unlink()
    (snapshot / "generation_config.json").unlink()
    if not has_tree:
        shutil.rmtree(snapshot.parents[1] / "trees")
    assert offline(settings) == {}
    report = run(settings)
    assert report.results[0].fetched_bytes == 2
    assert (snapshot / "generation_config.json").read_bytes() == b"{}"
    assert offline(settings) == {NAME: snapshot}


# --- ordinary repositories


def test_files_with_the_same_bytes(hub: LoopbackHub, settings: Settings) -> None:
    """Each content is downloaded once and linked under each name; empty files too."""
    files = HUGGING_FACE | {"added_tokens.json": b"{}", "special_tokens_map.json": b"{}"}
    files |= {"merges.txt": b"", "normalizer.json": b""}
    hub.add(NAME, files)
    report = run(settings)
    assert_well(report, settings, files)
    assert report.results[0].fetched_bytes == sum(map(len, set(files.values())))
    assert sum("/resolve/" in request for request in hub.requests) == len(set(files.values())) - 1  # one file is empty
    assert run(settings).results[0].outcome == "ok"


def test_a_branch_and_a_tag_below_it(hub: LoopbackHub, repo: HubRepo, settings: Settings) -> None:
    """Both are served in any order; the one whose name cannot be a ref is kept by a ref of whisperd."""
    final = repo.commit(whisper_files(2), branch="v1/final")
    branch = repo.commit(whisper_files(3), branch="v1")
    references = (f"{NAME}@v1", f"{NAME}@v1/final")
    for order in (references, references[::-1]):
        shutil.rmtree(settings.cache_dir, ignore_errors=True)
        for reference in order:
            assert run(settings, reference).exit_code == 0
        hub.requests.clear()
        report = reconcile([replace(wanted(reference)[0], name=reference) for reference in references], settings)
        assert {result.name: result.path.name for result in report.results if result.path} == {
            references[0]: branch, references[1]: final,
        }  # fmt: skip
        assert [result.outcome for result in report.results] == ["ok", "ok"]
        assert hub.requests == []
        hf_cache(settings, "prune", "-y")
        assert [run(settings, reference).results[0].outcome for reference in references] == ["ok", "ok"]
        assert_readable_by_the_library(settings)


def test_a_branch_called_whisperd(repo: HubRepo, settings: Settings) -> None:
    """A branch named whisperd does not disturb a pinned commit."""
    pinned = repo.refs["main"]
    branch = repo.commit(whisper_files(2), branch="whisperd")
    for reference in (f"{NAME}@{pinned}", f"{NAME}@whisperd", f"{NAME}@{pinned}"):
        assert run(settings, reference).exit_code == 0
    hf_cache(settings, "prune", "-y")
    assert ref(settings, "whisperd") == branch
    for reference in (f"{NAME}@{pinned}", f"{NAME}@whisperd"):
        assert run(settings, reference).results[0].outcome == "ok"


def test_another_tool_moves_the_branch_and_cleans(
    hub: LoopbackHub, repo: HubRepo, settings: Settings, filled: Path
) -> None:
    """After ``hf download`` has moved the branch and ``hf cache prune`` has cleaned, a boot needs no Hub."""
    assert run(settings).exit_code == 0
    repo.commit(whisper_files(2))
    assert plain(settings.cache_dir, hub.endpoint).error is None
    assert ref(settings) != filled.name
    hf_cache(settings, "prune", "-y")
    assert offline(settings) == {NAME: filled}
    # a cache of an earlier version has no such ref: then the commit to which the branch was moved serves
    shutil.rmtree(settings.cache_dir / FOLDER / "refs/~whisperd")
    hf_cache(settings, "prune", "-y")
    assert {name: path.name for name, path in offline(settings).items()} == {NAME: ref(settings)}


def test_scratch_files(repo: HubRepo, settings: Settings, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfinished files are where no other tool looks; what a kill left behind is removed by the next run."""
    left = [
        settings.cache_dir / ".whisperd.lock.abcd1234",
        settings.cache_dir / ".whisperd/.stamps.json.abcd_123",
        settings.cache_dir / ".whisperd/probe-abc/file",
        settings.cache_dir / FOLDER / "refs/.main.a1b2c3d4",
        settings.cache_dir / FOLDER / ".whisperd/.main.a1b2c3d4",
        filled / ".config.json.whisperd",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    made: list[str] = []

    def mkstemp(dir: Path, prefix: str) -> tuple[int, str]:
        made.append(dir.name)
        return real(dir=os.fspath(dir), prefix=prefix)

    real = tempfile.mkstemp
    monkeypatch.setattr("whisperd.files.tempfile.mkstemp", mkstemp)
    repo.commit(whisper_files(2))
    assert run(replace(settings, update=True)).exit_code == 0
    assert not any(path.exists() for path in left)
    assert len(made) >= 4
    assert set(made) == {".whisperd"}
    assert_readable_by_the_library(settings)


# --- disks


@contextmanager
def disk(directory: Path, options: str = "size=64m") -> Iterator[None]:
    if os.geteuid():
        pytest.skip("mounting needs root")
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)],  # noqa: S607
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"this machine does not let mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)  # noqa: S607


@pytest.mark.parametrize("linked", [FOLDER, f"{FOLDER}/blobs", ".whisperd"])
def test_a_link_to_another_disk(repo: HubRepo, settings: Settings, tmp_path: Path, linked: str) -> None:
    """Whatever directory of the cache is on another disk, parts are beside the blobs, and moving them works."""
    link = settings.cache_dir / linked
    link.parent.mkdir(parents=True)
    with disk(tmp_path / "disk"):
        link.symlink_to(tmp_path / "disk")
        report = run(settings)
        assert (report.exit_code, model_bytes(report)) == (0, whisper_files(1)["model.bin"]), report
        assert offline(settings) == report.snapshots
        assert link.is_symlink()
        repo.commit(whisper_files(2))
        assert model_bytes(run(replace(settings, update=True))) == whisper_files(2)["model.bin"]
        assert not any(path.name == "staging" or path.parent.name == "staging" for path in tmp_path.rglob("*"))


def test_another_disk_that_is_full(hub: LoopbackHub, repo: HubRepo, settings: Settings, tmp_path: Path) -> None:
    """Free space is checked where the bytes will be written, before the first one comes."""
    link = settings.cache_dir / FOLDER / "blobs"
    link.parent.mkdir(parents=True)
    with disk(tmp_path / "disk", "size=200k"):
        link.symlink_to(tmp_path / "disk")
        report = run(settings)
    assert repo.refs
    assert isinstance(error(report), errors.DiskFull)
    assert not any("/resolve/" in request for request in hub.requests)


NO_FLOCK = """
import ctypes, struct
# a filter of the kernel: flock ends with ENOLCK, as on NFS without lockd
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 73), (0x06, 0, 0, 0x00050025), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
"""
HOLD_TWICE = """
import json, sys, threading
from pathlib import Path
from whisperd import errors
from whisperd.store.preflight import one_writer, preflight
cache = Path(sys.argv[1])
preflight(cache)
held = cache / ".whisperd/lock.held"
held.write_text(json.dumps([2**22 + 1, __import__("socket").gethostname(), "1"]))  # of a process that has ended
with one_writer(cache, patience_s=5):
    try:
        with one_writer(cache):
            print("two writers")
    except errors.CacheBusy as error:
        print("busy", held.exists())
print("free", held.exists())
held.write_text(json.dumps([1, "another-host", "1"]))
try:
    with one_writer(cache):
        print("two writers")
except errors.CacheBusy as error:
    print("busy", held.exists())
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter names system calls by their numbers")
def test_a_file_system_without_locks(tmp_path: Path) -> None:
    """A file that names its owner still keeps writers apart; one of a process that has ended is removed."""
    done = subprocess.run(
        [sys.executable, "-c", NO_FLOCK + HOLD_TWICE, str(tmp_path / "cache")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["busy True", "free False", "busy True"], done.stderr


# --- staging


def a_link(part: Path, victim: Path) -> None:
    part.symlink_to(victim)


def a_hard_link(part: Path, victim: Path) -> None:
    part.hardlink_to(victim)


def a_fifo(part: Path, victim: Path) -> None:
    os.mkfifo(part)
    assert victim.exists()


def a_directory(part: Path, victim: Path) -> None:
    part.mkdir()
    shutil.copy(victim, part / "file")


@pytest.mark.parametrize("odd", [a_link, a_hard_link, a_fifo, a_directory])
def test_a_part_that_is_no_file(
    repo: HubRepo, settings: Settings, tmp_path: Path, odd: Callable[[Path, Path], None]
) -> None:
    """Bytes are appended only to a regular file with one name."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    part = settings.cache_dir / ".whisperd/staging" / FOLDER / repo.commits[repo.refs["main"]]["model.bin"].sha256
    part.parent.mkdir(parents=True)
    odd(part, victim)
    assert_well(run(settings), settings, whisper_files(1))
    assert victim.read_bytes() == b"mine"


def test_a_cache_that_was_moved(settings: Settings, filled: Path, tmp_path: Path) -> None:
    """Relative links work in a copy of the cache; nothing is fetched."""
    copy_cache(settings.cache_dir, tmp_path / "copy")
    there = replace(settings, cache_dir=tmp_path / "copy")
    assert offline(there) == {NAME: tmp_path / "copy" / filled.relative_to(settings.cache_dir)}
    assert json.loads((tmp_path / "copy/whisperd.lock").read_text())["version"] == 1
