"""``whisperd reconcile`` as it reads its command line, without a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from whisperd.cli import cli
from whisperd.errors import ConfigError, UsageError

REFUSED = ["a/b--c", "a--b/c", "-a/b", "a/b.", "large-v3", "path:/", "path:models", "a/b@../x"]


@pytest.mark.parametrize("reference", REFUSED)
def test_option_and_file_refuse_the_same_references(reference: str, tmp_path: Path) -> None:
    """What whisperd.toml refuses, ``-m`` refuses, in the same words, before a cache or a daemon is looked at."""
    runner, base = CliRunner(), ["reconcile", "-c", "/dev/null", "--check", "--cache-dir", str(tmp_path / "cache")]
    by_option = runner.invoke(cli, [*base, "-m", reference]).exception
    by_file = runner.invoke(cli, [*base, "-o", f'models=["{reference}"]']).exception
    assert isinstance(by_option, UsageError)
    assert isinstance(by_file, ConfigError)
    assert str(by_option).partition("expects ")[2] == str(by_file).partition("expects ")[2] != ""
    assert not (tmp_path / "cache").exists()
