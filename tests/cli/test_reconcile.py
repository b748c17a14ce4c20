"""``whisperd reconcile`` as it reads its command line, without a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from whisperd.cli import cli
from whisperd.errors import ConfigError, UsageError

REFUSED = ["a/b--c", "a--b/c", "-a/b", "a/b.", "large-v3", "path:/", "path:models", "a/b@../x"]
LOADED = "import atexit, sys; from whisperd.cli import main; atexit.register(lambda: print(*sys.modules)); main()"
NOT_LOADED = frozenset(
    {"asyncio", "av", "ctranslate2", "huggingface_hub", "numpy", "onnxruntime", "starlette", "tokenizers", "uvicorn"}
)


@pytest.mark.parametrize("reference", REFUSED)
def test_option_and_file_refuse_the_same_references(reference: str, tmp_path: Path) -> None:
    """What whisperd.toml refuses, ``-m`` refuses in the same words, before a cache or a daemon is looked at."""
    runner, base = CliRunner(), ["reconcile", "-c", "/dev/null", "--check", "--cache-dir", str(tmp_path / "cache")]
    by_option = runner.invoke(cli, [*base, "-m", reference]).exception
    by_file = runner.invoke(cli, [*base, "-o", f'models=["{reference}"]']).exception
    assert isinstance(by_option, UsageError)
    assert isinstance(by_file, ConfigError)
    assert str(by_option).partition("expects ")[2] == str(by_file).partition("expects ")[2] != ""
    assert not (tmp_path / "cache").exists()


def modules_of(*arguments: str) -> set[str]:
    """All modules that a command has loaded by its end."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_store_loads_neither_server_nor_engine(snapshot: Path, tmp_path: Path) -> None:
    """A whole check of the cache loads no front end, no engine and no numpy."""
    loaded = modules_of(
        "reconcile", "-c", "/dev/null", "--check", "--cache-dir", str(tmp_path), "-m", f"path:{snapshot}"
    )
    wings = {name.split(".")[1] for name in loaded if name.startswith("whisperd.")}
    assert {"cli", "store"} <= wings
    assert wings <= {"cli", "client", "config", "errors", "files", "reference", "store", "subprocesses", "version"}
    assert loaded.isdisjoint(NOT_LOADED)
