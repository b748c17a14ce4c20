"""Helpers for tests of the store: caches, runs, contents of the disk, and plain huggingface_hub for comparison."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.loopback_hub import git_sha1
from whisperd import errors
from whisperd.config import Config
from whisperd.reference import parse
from whisperd.store.hub.failures import CURES
from whisperd.store.reconcile import Report, reconcile, snapshots_without_network
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted

NAME = "org/model"
FOLDER = "models--org--model"
PLAIN = """
import json, sys, warnings
from huggingface_hub import snapshot_download
warnings.simplefilter("ignore")
try:
    print(json.dumps({"path": snapshot_download(**json.loads(sys.argv[1]))}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "errno": getattr(error, "errno", None)}))
"""


def store_settings(**changes: Any) -> Settings:
    """Every option at its default, but for ``changes``."""
    return replace(Settings.from_config(Config(), {}), **changes)


def wanted(*references: str) -> list[Wanted]:
    return [Wanted(name=reference.partition("@")[0], source=parse(reference)) for reference in references]


def run(settings: Settings, *references: str) -> Report:
    return reconcile(wanted(*references or (NAME,)), settings)


def offline(settings: Settings) -> dict[str, Path]:
    """The snapshots that can be served without a request to the Hub."""
    return snapshots_without_network(wanted(NAME), settings)


def tree(directory: Path) -> dict[str, str]:
    """Every file and link below a directory with its content."""
    return {
        str(path.relative_to(directory)): os.fspath(path.readlink())
        if path.is_symlink()
        else git_sha1(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def model_bytes(report: Report) -> bytes:
    path = report.results[0].path
    assert path is not None
    return (path / "model.bin").read_bytes()


def ref(settings: Settings, branch: str = "main") -> str:
    return (settings.cache_dir / FOLDER / "refs" / branch).read_text()


def error(report: Report) -> errors.Error:
    found = report.results[0].error
    assert found is not None, report
    return found


def assert_told(text: str, kind: type[errors.StoreError], cause: str, settings: Settings) -> None:
    """Asserts that a message names the model, the cause and the remedy."""
    assert NAME in text
    assert cause in text
    assert CURES[kind].format(endpoint=settings.endpoint, repo=NAME) in text


def orphans(settings: Settings) -> list[Path]:
    """Files that a broken download has left behind."""
    everything = list(settings.cache_dir.rglob("*"))
    staging = [path for path in everything if ".whisperd/staging" in str(path)]
    scratch = [path for path in everything if path.name.startswith(".") and path.name != ".whisperd"]
    return [*staging, *scratch, *settings.cache_dir.rglob("*.incomplete"), *settings.cache_dir.rglob("probe-*")]


def assert_well(report: Report, settings: Settings, files: dict[str, bytes]) -> None:
    """Asserts that the cache holds every byte and the ref of the commit, and nothing else."""
    assert report.exit_code == 0, report
    assert not any(result.warning for result in report.results), report
    path = report.snapshots[NAME]
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == {
        name: data for name, data in files.items() if name not in (".gitattributes", "README.md")
    }
    assert ref(settings) == path.name
    assert orphans(settings) == []
    assert offline(settings) == {NAME: path}


def copy_cache(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """The outcome of a plain ``snapshot_download``: a path, or the name of the exception."""

    path: Path | None = None
    error: str | None = None
    errno: int | None = None


def plain_command(cache_dir: Path, **options: Any) -> list[str]:
    return [sys.executable, "-c", PLAIN, json.dumps({"repo_id": NAME, "cache_dir": str(cache_dir), **options})]


def plain_environ(cache_dir: Path, **changes: str) -> dict[str, str]:
    home = cache_dir.parent / "plain-home"
    return {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **changes}


def plain(
    cache_dir: Path,
    endpoint: str,
    *,
    timeout_s: float = 120.0,
    environ: Mapping[str, str] | None = None,
    **options: Any,
) -> Plain:
    """Runs plain ``snapshot_download`` in a process of its own; raises TimeoutError after killing it."""
    try:
        done = subprocess.run(
            plain_command(cache_dir, endpoint=endpoint, **options),
            env=plain_environ(cache_dir, **environ or {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise TimeoutError from late
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": done.stderr}
    return Plain(**{**found, "path": Path(found["path"]) if found.get("path") else None})
