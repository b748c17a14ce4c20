"""In every known failure of the network nothing wrong is accepted, and the existing model keeps serving."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import running
from tests.support.loopback_hub import BAD_TOKEN, HubRepo, LoopbackHub, whisper_files
from tests.support.speech import Clip
from tests.support.speech import plain as plain_text
from tests.support.store import (
    FOLDER,
    NAME,
    assert_told,
    assert_well,
    error,
    offline,
    orphans,
    plain,
    ref,
    run,
    store_settings,
    tree,
    wanted,
)  # fmt: skip
from whisperd import errors
from whisperd.store.reconcile import reconcile
from whisperd.store.settings import Settings

API = "/revision/"
BODY = "GET /cdn/"
PORTAL = b"<html><body>Welcome to our hotel. Please accept the conditions.</body></html>"
DEAD = "http://127.0.0.1:9"

Arrange = Callable[[LoopbackHub, Settings], Settings]


def fault(match: str, **what: object) -> Arrange:
    def arrange(hub: LoopbackHub, settings: Settings) -> Settings:
        hub.fault(match, **what)
        return settings

    return arrange


def with_settings(**changes: Any) -> Arrange:
    return lambda _, settings: replace(settings, **changes)


def repository(**changes: object) -> Arrange:
    """The repository has become private, say."""

    def arrange(hub: LoopbackHub, settings: Settings) -> Settings:
        for name, value in changes.items():
            setattr(hub.repos[NAME], name, value)
        return settings

    return arrange


def both(first: Arrange, second: Arrange) -> Arrange:
    return lambda hub, settings: second(hub, first(hub, settings))


def deleted(hub: LoopbackHub, settings: Settings) -> Settings:
    hub.repos.clear()
    return settings


def history_rewritten(hub: LoopbackHub, settings: Settings) -> Settings:
    hub.repos[NAME] = HubRepo(id=NAME)
    return settings


def redirected(hub: LoopbackHub, settings: Settings) -> Settings:
    hub.resolve_cache = True
    return settings


def black_holed(hub: LoopbackHub, settings: Settings) -> Settings:
    return replace(settings, endpoint=hub.nowhere, metadata_timeout_s=0.4)


# faults that last while the Hub is asked: how each is arranged, its name, and a word of the cause
UNASKABLE = {
    "connection refused": (with_settings(endpoint=DEAD), errors.HubUnreachable, "refused"),
    "no such host": (with_settings(endpoint="http://hub.invalid"), errors.HubUnreachable, "ConnectError"),
    "black-holed SYN": (black_holed, errors.HubUnreachable, "timed out"),
    "401 bad token": (with_settings(token=BAD_TOKEN), errors.HubAuthError, "Invalid credentials"),
    "private, no token": (repository(private=True), errors.RepoNotFound, "401"),
    "private, wrong token": (
        both(repository(private=True), with_settings(token="hf_other")), errors.RepoNotFound, "404",
    ),
    "gated, no token": (repository(gated=True), errors.GatedError, "401"),
    "gated, not granted": (both(repository(gated=True), with_settings(token="hf_other")), errors.GatedError, "403"),
    "repository deleted": (deleted, errors.RepoNotFound, "Repository not found"),
    "404 revision": (history_rewritten, errors.RevisionNotFound, "Invalid rev id: main"),
    "429 for ever": (fault(API, status=429), errors.HubRateLimited, "429"),
    "500 for ever": (fault(API, status=500), errors.HubServerError, "500"),
    "503 for everything": (fault("", status=503), errors.HubServerError, "503"),
    "closed without an answer": (fault(API, close=True), errors.HubUnreachable, "RemoteProtocolError"),
    "reset": (fault(API, reset=True), errors.HubUnreachable, "ReadError"),
    "stalled before the answer": (
        both(fault(API, silent=True), with_settings(metadata_timeout_s=0.4)), errors.HubUnreachable, "timed out",
    ),
    "captive portal": (fault(API, status=200, body=PORTAL), errors.HubUnreachable, "JSONDecodeError"),
    "JSON without a commit": (
        fault(API, status=200, body=b'{"id": "org/model"}'), errors.HubUnreachable, "no answer of a Hub: sha",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arrange", "kind", "cause"), UNASKABLE.values(), ids=UNASKABLE)
def test_the_hub_cannot_be_asked(
    hub: LoopbackHub, repo: HubRepo, settings: Settings, tmp_path: Path, filled: Path,
    arrange: Arrange, kind: type[errors.StoreError], cause: str,
) -> None:  # fmt: skip
    """A cold cache fails, a warm one is used and reported as unchecked, force fails; then all is well again."""
    repo.commit(whisper_files(2))
    broken = arrange(hub, settings)
    cold = run(replace(broken, cache_dir=tmp_path / "cold"))
    assert (cold.exit_code, type(error(cold)), cold.results[0].path) == (1, kind, None), error(cold)
    assert_told(str(error(cold)), kind, cause, broken)
    assert not any((tmp_path / "cold").glob("models--*"))

    before = tree(settings.cache_dir / FOLDER)
    warm = run(replace(broken, update=True))
    assert (warm.exit_code, warm.results[0].outcome, warm.results[0].path) == (0, "ok", filled)
    assert str(warm.results[0].warning).startswith("could not check for updates: ")
    assert_told(str(warm.results[0].warning), kind, cause, broken)

    forced = run(replace(broken, force=True))
    assert (forced.exit_code, forced.results[0].outcome, forced.results[0].path) == (1, "failed", filled)
    assert offline(settings) == {NAME: filled}
    assert tree(settings.cache_dir / FOLDER) == before
    assert orphans(settings) == []

    hub.faults.clear()
    hub.repos[NAME] = repo
    repo.private = repo.gated = False
    assert_well(run(replace(settings, update=True)), settings, whisper_files(2))


# faults that occur once, or only for requests that whisperd does not make
PASSING = {
    "429 once when asked": fault(API, times=1, status=429),
    "429 with Retry-After once when asked": fault(API, times=1, status=429, headers={"Retry-After": "1"}),
    "500 once when asked": fault(API, times=1, status=500),
    "closed once when asked": fault(API, times=1, close=True),
    "reset once when asked": fault(API, times=1, reset=True),
    "429 with Retry-After once for a body": fault(BODY, times=1, status=429, headers={"Retry-After": "1"}),
    "500 once for a body": fault(BODY, times=1, status=500),
    "503 once for a small file": fault("resolve/.*/config.json", times=1, status=503),
    "reset once for a body": fault(BODY, times=1, reset=True),
    "closed once for a body": fault(BODY, times=1, close=True),
    "503 for every tree": fault("/tree/", status=503),
    "stalled tree": fault("/tree/", silent=True),
    "503 for every HEAD": fault("^HEAD", status=503),
    "stalled HEAD": fault("^HEAD", silent=True),
    "small files redirected inside the Hub": redirected,
}


@pytest.mark.parametrize("arrange", PASSING.values(), ids=PASSING)
@pytest.mark.usefixtures("repo")
def test_a_bad_moment(hub: LoopbackHub, settings: Settings, arrange: Arrange) -> None:
    """A fault that occurs once is retried; what is not needed is not requested."""
    assert_well(run(arrange(hub, settings)), settings, whisper_files(1))
    assert not any(one.times for one in hub.faults)


def test_500_for_a_head_under_force(hub: LoopbackHub, filled: Path, settings: Settings) -> None:
    """Force needs no HEAD; plain force fails on one after it has replaced the other files."""
    inode = (filled / "model.bin").stat().st_ino
    hub.fault("^HEAD", status=500)
    assert_well(run(replace(settings, force=True)), settings, whisper_files(1))
    assert (filled / "model.bin").stat().st_ino != inode


# fault, whether plain snapshot_download is forced, and the exception that it lets through: none is a false success
PLAIN = {
    "connection refused under force": (with_settings(endpoint=DEAD), True, None),
    "401 bad token": (with_settings(token=BAD_TOKEN), False, None),
    "repository deleted under force": (deleted, True, None),
    "429 once": (fault(API, times=1, status=429), False, None),
    "500 once": (fault(API, times=1, status=500), False, None),
    "503 for everything under force": (fault("", status=503), True, None),
    "closed without an answer": (fault(API, close=True), False, "RemoteProtocolError"),
    "reset": (fault(API, reset=True), False, "ReadError"),
    "captive portal": (fault(API, status=200, body=PORTAL), False, "JSONDecodeError"),
    "JSON without a commit": (fault(API, status=200, body=b'{"id": "org/model"}'), False, "AssertionError"),
}


@pytest.mark.parametrize(("arrange", "force", "leaks"), PLAIN.values(), ids=PLAIN)
def test_plain_snapshot_download(
    hub: LoopbackHub, repo: HubRepo, settings: Settings, plain_cache: Path,
    arrange: Arrange, force: bool, leaks: str | None,
) -> None:  # fmt: skip
    """With an update pending the library alone reports the old copy as success, or raises an internal exception."""
    old = repo.refs["main"]
    repo.commit(whisper_files(2))
    broken = arrange(hub, settings)
    done = plain(plain_cache, broken.endpoint, token=broken.token or False, force_download=force)
    assert done.error == leaks
    assert (done.path.name if done.path else None) == (None if leaks else old)


def test_a_stalled_answer_stalls_plain_snapshot_download(hub: LoopbackHub, repo: HubRepo, plain_cache: Path) -> None:
    """The library requests without a time limit; whisperd's own limit is in the table above."""
    repo.commit(whisper_files(2))
    hub.fault(API, silent=True)
    with pytest.raises(TimeoutError):
        plain(plain_cache, hub.endpoint, timeout_s=6)


def test_boot_without_a_network(hub: LoopbackHub, tmp_path: Path, snapshot: Path, clips: dict[str, Clip]) -> None:
    """A daemon in a network namespace without routes is ready and transcribes: a complete cache needs no connection."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("a network namespace needs root and unshare")
    hub.add(NAME, {path.name: path.read_bytes() for path in snapshot.iterdir() if path.is_file()})
    settings = store_settings(cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    assert reconcile(wanted(NAME), settings).exit_code == 0
    assert ref(settings) == hub.repos[NAME].refs["main"]
    text = f'models = ["{NAME}"]\n[reconcile]\nendpoint = "{hub.endpoint}"'
    hub.requests.clear()
    started_s = time.monotonic()
    with running(tmp_path, text, prefix=("unshare", "--net")) as daemon:
        sys.stdout.write(f"ready without a network after {time.monotonic() - started_s:.1f} s\n")
        links = Path(f"/proc/{daemon.process.pid}/net/dev").read_text().splitlines()[2:]
        routes = Path(f"/proc/{daemon.process.pid}/net/route").read_text().splitlines()[1:]
        assert ([line.split(":")[0].strip() for line in links], routes) == (["lo"], [])
        assert plain_text(daemon.transcribe(clips["monkeys"].path)["text"]) == plain_text(clips["monkeys"].text)
    assert hub.requests == []
