"""Closed, full and abandoned standard streams end a command with a documented code, never with a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loopback_hub import HubRepo, LoopbackHub

SHOW = ["config", "-c", "/dev/null"]
WRONG = ["config", "-c", "/dev/null", "--check", "-o", "server.spool_dir='/none'"]


def run(directory: Path, arguments: list[str], redirection: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command whose streams a shell has redirected."""
    done = subprocess.run(
        ["/bin/bash", "-c", f'set -o pipefail; "$0" -m whisperd "$@" {redirection}', sys.executable, *arguments],
        cwd=directory,
        env={"PATH": "/usr/bin:/bin", "HOME": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "message"),
    [
        (SHOW, ">/dev/full", 74, "whisperd: cannot write to stdout: No space left on device\n"),
        (SHOW, ">&-", 74, "whisperd: cannot write to stdout: Bad file descriptor\n"),
        (["--help"], ">/dev/full", 74, "whisperd: cannot write to stdout: No space left on device\n"),
        (SHOW, "2>/dev/full", 0, ""),
        (SHOW, "2>&-", 0, ""),
        (WRONG, "2>/dev/full", 78, ""),
        (WRONG, "2>&-", 78, ""),
        (SHOW, ">&- 2>&- <&-", 74, ""),
        (SHOW, "| head -n 1", 0, "config: /dev/null\n"),
    ],
)
def test_streams_that_cannot_be_written(
    arguments: list[str], redirection: str, code: int, message: str, tmp_path: Path
) -> None:
    """A lost result exits with 74; a lost message changes nothing, and a reader may close its pipe."""
    returncode, _, stderr = run(tmp_path, arguments, redirection)
    assert (returncode, stderr.removeprefix("config: /dev/null\n" if code == 74 else "")) == (code, message)


def test_the_plan_is_shown_before_anything_is_done(hub: LoopbackHub, repo: HubRepo, tmp_path: Path) -> None:
    """A reconcile that cannot show its plan fetches nothing."""
    options = ["-c", "/dev/null", "--cache-dir", str(tmp_path / "cache"), "-o", f"reconcile.endpoint={hub.endpoint}"]
    code, _, stderr = run(tmp_path, ["reconcile", *options, "-m", repo.id], ">/dev/full")
    assert (code, stderr) == (74, "whisperd: cannot write to stdout: No space left on device\n")
    assert [line for line in hub.requests if "/api/models/" not in line] == []
    assert len(hub.requests) > 0
