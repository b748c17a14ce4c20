"""When a Hub, a mirror or a proxy answers nonsense, one model fails with a short message, and nothing else changes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import HubRepo, LoopbackHub, serving, whisper_files
from tests.support.store import NAME, store_settings, tree, wanted
from whisperd import errors
from whisperd.store.reconcile import Report, Result, reconcile

VICTIM = "victim"
Answer = dict[str, Any]


def siblings(answer: Answer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer["siblings"]
    return found


def config(**values: object) -> Callable[[Answer], object]:
    """Changes what the answer says of config.json."""

    def change(answer: Answer) -> None:
        next(one for one in siblings(answer) if one["rfilename"] == "config.json").update(values)

    return change


def weights(sha256: object) -> Callable[[Answer], object]:
    def change(answer: Answer) -> None:
        next(one for one in siblings(answer) if one["rfilename"] == "model.bin")["lfs"]["sha256"] = sha256

    return change


def whole(**values: object) -> Callable[[Answer], object]:
    return lambda answer: answer.update(values)


def add(**values: object) -> Callable[[Answer], object]:
    file = {"rfilename": "extra.json", "blobId": "a" * 40, "size": 1}
    return lambda answer: siblings(answer).append(file | values)


def twice(answer: Answer) -> None:
    first = siblings(answer)[0]
    siblings(answer).append({"rfilename": "copy", "blobId": first["blobId"], "size": first["size"] + 1})


# the answer, and a word of the message about it
ANSWERS: Mapping[str, tuple[Callable[[Answer], object], str]] = {
    "a hash that is a path": (weights(f"../../../{VICTIM}"), "lfs.sha256"),
    "a hash that is an absolute path": (weights(f"/{VICTIM}"), "lfs.sha256"),
    "a git hash that is a path": (config(blobId=f"../../../{VICTIM}"), "blobId"),
    "a commit that is a path": (whole(sha="../../../evil"), "sha"),
    "a short commit": (whole(sha="abc"), "sha"),
    "a commit with a newline": (whole(sha="a" * 40 + "\n"), "sha"),
    "a commit that is a number": (whole(sha=7), "sha"),
    "a size that is text": (config(size="12"), "size"),
    "a size below zero": (config(size=-1), "size"),
    "a size that is true": (config(size=True), "size"),
    "a size like a galaxy": (config(size=1 << 62), "size"),
    "no size": (config(size=None), "size"),
    "a name that is null": (config(rfilename=None), "rfilename"),
    "a name with NUL": (add(rfilename="a\0b"), "control characters"),
    "a name with ..": (add(rfilename="../evil"), "relative name"),
    "an absolute name": (add(rfilename="/etc/evil"), "relative name"),
    "a name with a backslash": (add(rfilename="..\\evil"), "backslash"),
    "a name that is too long": (add(rfilename="x" * 256), "longer than a file system takes"),
    "a lone surrogate": (add(rfilename="\ud800"), "siblings"),
    "one name twice": (add(rfilename="config.json"), "named twice"),
    "one content with two sizes": (twice, "has two sizes"),
    "files that are a number": (whole(siblings=5), "siblings"),
    "another id of a megabyte": (whole(id="x" * 1_000_000), "id"),
}
BODIES: Mapping[str, tuple[bytes, dict[str, str], str]] = {
    "deep JSON": (b"[" * 1_000_000, {}, "nested too deeply"),
    "a number": (b"5", {}, "no answer of a Hub"),
    "a bomb of gzip": (gzip.compress(bytes(200 << 20)), {"Content-Encoding": "gzip"}, "longer than"),
    "an encoding that nobody asked for": (b"{}", {"Content-Encoding": "br"}, "not asked for"),
    "a message of a megabyte": (b"x" * (1 << 20), {}, "JSONDecodeError"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    results: Mapping[str, Result]
    report: Report
    before: Mapping[str, str]
    after: Mapping[str, str]
    root: Path


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    """A model for each answer and an honest one, all in one run; the cache lies in a directory with a victim."""
    root = tmp_path_factory.mktemp("attacked")
    (root / VICTIM).write_text("mine")
    (root / "cache" / VICTIM).parent.mkdir()
    (root / "cache" / VICTIM).write_text("mine too")
    names = {f"org/m{number}": row for number, row in enumerate([*ANSWERS, *BODIES])}
    with serving() as hub:
        hub.add(NAME, whisper_files(1))
        for name, row in names.items():
            body, headers = (attack(hub, name, ANSWERS[row][0]), {}) if row in ANSWERS else BODIES[row][:2]
            hub.fault(f"/api/models/{name}/revision/", status=200, body=body, headers=headers)
        before = tree(root)
        settings = store_settings(
            cache_dir=root / "cache", endpoint=hub.endpoint, retry_wait_s=0.0, parallel=4, metadata_timeout_s=60.0
        )
        report = reconcile(wanted(*names, NAME), settings)
    results = {names.get(result.name, NAME): result for result in report.results}
    return Attacked(results=results, report=report, before=before, after=tree(root), root=root)


def attack(hub: LoopbackHub, name: str, change: Callable[[Answer], object]) -> bytes:
    repo = hub.add(name, whisper_files(1))
    answer = honest(repo)
    change(answer)
    return json.dumps(answer).encode()


def honest(repo: HubRepo) -> Answer:
    commit = repo.refs["main"]
    files = [
        {"rfilename": file.path, "blobId": file.oid, "size": len(file.data), **file.lfs("sha256")}
        for file in repo.commits[commit].values()
    ]
    return {"id": repo.id, "sha": commit, "siblings": files}


@pytest.mark.parametrize("row", [*ANSWERS, *BODIES])
def test_an_answer_of_nonsense(attacked: Attacked, row: str) -> None:
    """A nonsensical answer fails one model with one short line, and nothing of it is stored."""
    result = attacked.results[row]
    word = ANSWERS[row][1] if row in ANSWERS else BODIES[row][2]
    assert (result.outcome, result.path) == ("failed", None)
    assert isinstance(result.error, errors.HubUnreachable)
    assert word in str(result.error)
    assert "\n" not in str(result.error)
    assert len(str(result.error)) < 1000


def test_the_others_of_the_run(attacked: Attacked) -> None:
    """The honest model is fetched, and no file but those of its cache has changed."""
    assert attacked.results[NAME].outcome == "downloaded"
    assert {name: attacked.after.get(name) for name in attacked.before} == attacked.before
    made = {name for name in attacked.after if name not in attacked.before}
    own = ("cache/models--org--model/", "cache/.whisperd/", "cache/whisperd.lock")
    assert [name for name in made if not name.startswith(own)] == []
    assert len("\n".join(attacked.report.lines())) < 100_000


def test_answers_that_never_end(hub: LoopbackHub, tmp_path: Path) -> None:
    """An endless body is cut off after some megabytes, a slow one after the time for an answer."""
    hub.add("org/fast", whisper_files(1))
    hub.add("org/slow", whisper_files(1))
    hub.fault("/api/models/org/fast/", endless=True)
    hub.fault("/api/models/org/slow/", endless=True, rate_bytes_per_s=50.0)
    settings = store_settings(
        cache_dir=tmp_path / "cache", endpoint=hub.endpoint, retry_wait_s=0.0, metadata_timeout_s=0.7
    )
    report = reconcile(wanted("org/fast", "org/slow"), settings)
    fast, slow = (str(result.error) for result in report.results)
    assert ("longer than" in fast or "timed out" in fast, "timed out" in slow) == (True, True), (fast, slow)
    assert hub.sent_bytes < 200 << 20


def test_a_renamed_repository_is_said(hub: LoopbackHub, tmp_path: Path) -> None:
    """A repository that answers under another name is fetched, and the new name is reported."""
    repo = hub.add(NAME, whisper_files(1))
    hub.fault("/revision/", status=200, body=json.dumps(honest(repo) | {"id": "other/name"}).encode())
    settings = store_settings(cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    report = reconcile(wanted(NAME), settings)
    assert (report.exit_code, report.results[0].outcome) == (0, "downloaded")
    assert "the Hub calls org/model other/name now" in "\n".join(report.lines())


def test_another_commit_than_was_asked_for(hub: LoopbackHub, tmp_path: Path) -> None:
    """A pinned commit is that commit, whatever the Hub answers."""
    repo = hub.add(NAME, whisper_files(1))
    asked, other = repo.refs["main"], repo.commit(whisper_files(2))
    hub.fault("/revision/", status=200, body=json.dumps(honest(repo)).encode())
    settings = store_settings(cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    (result,) = reconcile(wanted(f"{NAME}@{asked}"), settings).results
    assert (result.outcome, f"answered with {other}" in str(result.error)) == ("failed", True)


def record(commit: str = "a" * 40, **file: object) -> str:
    files = [{"path": "model.bin", "size_bytes": 4, "hash": "b" * 40} | file]
    return json.dumps({"version": 1, "models": {"org/model@main": {"commit": commit, "files": files}}})


RECORDS = {
    "deep": "[" * 200_000,
    "a size that is text": record(size_bytes="1"),
    "a hash that is a path": record(hash=f"../../../{VICTIM}"),
    "a commit that is a path": record(commit="../../../evil"),
    "a repository that is a path": json.dumps({"version": 1, "models": {}, "fetched": {f"../../{VICTIM}": ["a" * 40]}}),
}


@pytest.mark.parametrize("text", RECORDS.values(), ids=RECORDS)
def test_a_record_of_nonsense(hub: LoopbackHub, repo: HubRepo, tmp_path: Path, text: str) -> None:
    """Nonsense in whisperd.lock and the stamps is ignored; the model is fetched all the same."""
    cache_dir = tmp_path / "cache"
    (cache_dir / ".whisperd").mkdir(parents=True)
    (cache_dir / "whisperd.lock").write_text(text)
    (cache_dir / ".whisperd/stamps.json").write_text(text)
    (tmp_path / VICTIM).write_text("mine")
    settings = store_settings(cache_dir=cache_dir, endpoint=hub.endpoint)
    report = reconcile(wanted(NAME), replace(settings, prune=True))
    assert (report.exit_code, report.snapshots[NAME].name) == (0, repo.refs["main"])
    assert (tmp_path / VICTIM).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", VICTIM}
