"""The recipes of the README and the docs are run unchanged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import EMBEDDED, DaemonProcess, running
from tests.support.speech import Clip, plain
from tests.test_docs import PAGES, blocks
from whisperd.serving.sockets import bind_tcp

RECIPES = sorted(
    {
        line
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", "").splitlines()
        if line.startswith("curl ")
    }
)
SNIPPETS = {page: blocks(page, "python") for page in PAGES if blocks(page, "python")}
ADDRESS = "127.0.0.1:9000"  # as the pages have it
EXPECTED = {  # what an answer to a recipe holds, by a word of the recipe
    "response_format=srt": "1\n00:00:00,000 --> ",
    "max_line_width": "WEBVTT",
    "verbose_json": '"words":',
    "stream=true": "data: [DONE]",
    "logprobs": '"bytes":',
    "/v1/models": '"object":"list"',
    "readyz": '{"status":"ok"}',
    "/metrics": "whisperd_ready 1.0",
    "openapi.json": '"openapi":"3.1.0"',
    "Bearer": "monkeys",
    "reload": '"ok":true',
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, clips: dict[str, Clip]) -> Iterator[DaemonProcess]:
    """A daemon with a TCP listener, beside the files that the recipes name."""
    directory = tmp_path_factory.mktemp("readme")
    shutil.copy(clips["monkeys"].path, directory / "talk.mp3")  # its name does not matter
    (directory / "KEY").write_text("secret\n")
    with running(directory, f'models = ["{EMBEDDED}"]') as process:
        yield process


@pytest.fixture(scope="module")
def tcp(tmp_path_factory: pytest.TempPathFactory, daemon: DaemonProcess) -> Iterator[str]:
    """The address of a daemon that listens on TCP as well, on a port that is free here."""
    with bind_tcp("127.0.0.1:0") as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["-o", f'server.tcp="{address}"', "-o", f'server.tcp_key_file="{daemon.directory}/KEY"']
    with running(tmp_path_factory.mktemp("tcp"), f'models = ["{EMBEDDED}"]', arguments=options):
        yield address


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(daemon: DaemonProcess, request: pytest.FixtureRequest, recipe: str) -> None:
    """A recipe succeeds, and its answer is the documented one."""
    if ADDRESS in recipe:
        recipe = recipe.replace(ADDRESS, request.getfixturevalue("tcp"))
    command = recipe.replace("SOCKET", str(daemon.socket_path)).replace("curl ", "curl -sS --fail-with-body ", 1)
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=daemon.directory, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (expected,) = [text for word, text in EXPECTED.items() if word in recipe] or ["monkeys"]
    assert expected in done.stdout
    if "file=@" in recipe and "stream" not in recipe and "logprobs" not in recipe:
        assert "monkeys" in plain(done.stdout)


def test_there_are_recipes() -> None:
    """Each word of the table belongs to a recipe."""
    assert all(any(word in recipe for recipe in RECIPES) for word in EXPECTED)


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_python(daemon: DaemonProcess, page: Path) -> None:
    """Python code of a page runs, and prints a transcript or a directory."""
    for snippet in SNIPPETS[page]:
        program = snippet.replace("/run/whisperd.sock", str(daemon.socket_path))
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=daemon.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "monkeys" in done.stdout or Path(done.stdout.strip()).is_dir()
