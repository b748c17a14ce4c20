"""Children get only what is meant for them, are certainly ended, and their end is described."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whisperd.subprocesses import SECRETS, LastLine, command, describe_end, environment, kill_group, stop

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); signal.pause()"
FAMILY = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"


def python(code: str, **options: object) -> subprocess.Popen[str]:
    """A child that has written its first line."""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_command_runs_a_module_of_this_whisperd(tmp_path: Path) -> None:
    """The child imports this whisperd from any directory, not one that is there, and gets only its own arguments."""
    (tmp_path / "whisperd").mkdir()
    (tmp_path / "whisperd/__init__.py").write_text("raise ImportError")
    done = subprocess.run(
        command("whisperd.cli", "--version"), cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("whisperd, version ")


def test_an_environment_without_what_is_not_for_the_child() -> None:
    """systemd's variables are left out, secrets where requested; the rest is passed."""
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_PID": "1", "HF_TOKEN": "hf_secret", "HOME": "/root"}
    assert environment(environ) == {"HF_TOKEN": "hf_secret", "HOME": "/root"}
    assert environment(environ, without=SECRETS) == {"HOME": "/root"}


@pytest.mark.parametrize(
    ("code", "last_line", "words"),
    [
        (3, "", "ended with exit code 3"),
        (1, "ImportError: x", "ended with exit code 1: ImportError: x"),
        (-9, "", "was killed (SIGKILL): out of memory?"),
        (-11, "", "was killed (SIGSEGV)"),
    ],
)
def test_the_end_in_words(code: int, last_line: str, words: str) -> None:
    """A signal is named; SIGKILL is reported as a possible lack of memory."""
    assert describe_end(code, last_line) == words


def test_stop_is_certain() -> None:
    """A child that ends at the signal is waited for; one that ignores it is killed; an ended one is no error."""
    with python("import signal; print('on', flush=True); signal.pause()") as polite, python(STUBBORN) as stubborn:
        assert [first_line(polite), first_line(stubborn)] == ["on", "on"]
        assert stop(polite, 30.0) == -signal.SIGTERM
        assert stop(stubborn, 0.1) == -signal.SIGKILL
        assert stop(polite, 30.0) == -signal.SIGTERM


def test_a_group_is_killed_whole() -> None:
    """The children of a child end with it; a missing group is no error."""
    with python(FAMILY, stdin=subprocess.PIPE, start_new_session=True) as parent:
        grandchild = int(first_line(parent))
        kill_group(parent)
        assert parent.wait(30.0) == -signal.SIGKILL
        deadline_s = time.monotonic() + 30.0
        while Path(f"/proc/{grandchild}/stat").exists():
            if Path(f"/proc/{grandchild}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                break
            assert time.monotonic() < deadline_s
        kill_group(parent)


def test_the_last_line_is_kept() -> None:
    """Of all output, the last line with text is kept, shortened."""
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as stream:
        last = LastLine(stream)
        os.write(write, b"Traceback\n  File\n" + b"E" * 1000 + b"\n\n")
        os.close(write)
        assert last.join() == "E" * 300
