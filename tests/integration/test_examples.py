"""The examples are run unchanged against a real daemon."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import EMBEDDED, PATIENCE_S, DaemonProcess, clean_environ, running
from tests.support.speech import Clip, plain
from tests.test_house import ROOT

EXAMPLES = ROOT / "examples"
PYTHON = {  # what each example prints of one file, once for each time that it requests it
    "standard_library.py": 1,
    "openai_sdk.py": 2,
    "openai_async.py": 1,
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running(tmp_path_factory.mktemp("examples"), f'models = ["{EMBEDDED}"]') as process:
        yield process


def run(daemon: DaemonProcess, *command: str | Path) -> str:
    environ = clean_environ(daemon.directory, {"WHISPERD_SOCKET": str(daemon.socket_path), "PYTHONWARNINGS": "error"})
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PYTHON)
def test_python(daemon: DaemonProcess, clips: dict[str, Clip], name: str) -> None:
    """It prints the text of the file."""
    clip = clips["monkeys"]
    assert plain(run(daemon, sys.executable, EXAMPLES / name, clip.path)).count(plain(clip.text)) == PYTHON[name]


def test_many_files(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """Each line has a file with its own text."""
    chosen = [clips["monkeys"], clips["agent"]]
    lines = run(daemon, sys.executable, EXAMPLES / "openai_async.py", *(clip.path for clip in chosen)).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [clip.path.name for clip in chosen]
    assert [plain(line.partition(": ")[2]) for line in lines] == [plain(clip.text) for clip in chosen]


def test_download(daemon: DaemonProcess) -> None:
    """It prints the directory of a complete model."""
    found = Path(run(daemon, sys.executable, EXAMPLES / "download.py", EMBEDDED).strip())
    assert (found / "model.bin").is_file()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """The script gets text, subtitles, words and a stream."""
    said = run(daemon, EXAMPLES / "curl.sh", clips["monkeys"].path)
    assert all(part in said for part in ("\n1\n00:00:0", '"words":', "data: [DONE]"))


def test_every_example_is_run() -> None:
    """Each example has a test and a row in the table."""
    files = {
        path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.*") if "node_modules" not in path.parts
    }
    assert files == {*PYTHON, "download.py", "curl.sh", "node/openai.mjs", "README.md"}
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in table for name in files - {"README.md"})
