"""A secret is checked where it is read, and no output of the program contains it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.loopback_hub import LoopbackHub
from whisperd import download_model_if_needed
from whisperd.config import Config, hide, known_secrets, tcp_key, token
from whisperd.errors import ConfigError, StoreError
from whisperd.logs import SecretFilter

SECRET, OTHER = "hf_abcdefghijkl", "hf_mnopqrstuvwx"
MALFORMED = {
    "two lines": f"{SECRET}\n{OTHER}\n",
    "a space": f"{SECRET} {OTHER}",
    "a control character": f"{SECRET}\x07{OTHER}",
    "no ASCII": f"{SECRET}é{OTHER}",
}
Put = Callable[[Path, str], dict[str, str]]


def in_file(name: str, variable: str, value: str = "{directory}") -> Put:
    def put(directory: Path, text: str) -> dict[str, str]:
        (directory / name).write_text(text, encoding="utf-8")
        return {variable: value.format(directory=directory)}

    return put


SOURCES: dict[str, Put] = {
    "credential": in_file("hf-token", "CREDENTIALS_DIRECTORY"),
    "HF_TOKEN": lambda _, text: {"HF_TOKEN": text},
    "HUGGINGFACE_TOKEN": lambda _, text: {"HUGGINGFACE_TOKEN": text},
    "HUGGING_FACE_HUB_TOKEN": lambda _, text: {"HUGGING_FACE_HUB_TOKEN": text},
    "HF_TOKEN_PATH": in_file("own", "HF_TOKEN_PATH", "{directory}/own"),
    "token file": in_file("token", "HF_HOME"),
}
COMMANDS = {
    "reconcile --json": ["reconcile", "--json", "--check", "-m", "org/model"],
    "serve": ["serve", "-o", "models=['org/model']"],
}


@pytest.fixture(params=SOURCES)
def put(request: pytest.FixtureRequest) -> Put:
    """Puts a token into one source of tokens; returns the environment for it."""
    return SOURCES[request.param]


def run(directory: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with no other environment than the given one."""
    needed = {"PATH": os.environ["PATH"], "HOME": str(directory / "home"), "XDG_RUNTIME_DIR": str(directory)}
    return subprocess.run(
        [sys.executable, "-m", "whisperd", *arguments, "-c", "/dev/null"],
        env=needed | {"HF_HUB_CACHE": str(directory / "cache")} | environ,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_nothing_leaks(done: subprocess.CompletedProcess[str]) -> None:
    output = done.stdout + done.stderr
    assert SECRET not in output
    assert OTHER not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_secret_is_refused_without_being_quoted(put: Put, malformed: str, tmp_path: Path) -> None:
    """A malformed secret is refused with a message that names only its source and what was expected."""
    environ = put(tmp_path, MALFORMED[malformed])
    with pytest.raises(ConfigError, match="expects one line of printable ASCII without spaces") as caught:
        token(environ)
    assert SECRET not in str(caught.value)
    assert OTHER not in str(caught.value)
    assert {SECRET, OTHER} & known_secrets(Config(), environ) or malformed in ("a control character", "no ASCII")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_a_malformed_token(put: Put, command: str, tmp_path: Path) -> None:
    """Each command that uses the token ends with the code of a wrong configuration and does not show it."""
    done = run(tmp_path, put(tmp_path, MALFORMED["two lines"]), *COMMANDS[command])
    assert done.returncode == 78, done
    assert "expects one line of printable ASCII without spaces, got 2 lines" in done.stderr
    assert_nothing_leaks(done)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 401, "headers": {"X-Error-Message": f"Bearer {SECRET} is wrong"}},
        {"status": 403, "headers": {"X-Error-Message": f"Bearer {SECRET}", "X-Error-Code": "GatedRepo"}},
        {"status": 404, "headers": {"X-Error-Message": f"{SECRET}: not found"}},
        {"status": 400, "body": json.dumps({"error": f"Authorization: Bearer {SECRET}"}).encode()},
        {"replace": json.dumps({"sha": f"{SECRET}"}).encode()},
        {"replace": f"not JSON but {SECRET}".encode()},
    ],
    ids=["401", "403", "404", "400", "no commit", "no JSON"],
)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["lines", "json"])
def test_a_hub_that_quotes_the_token(
    hub: LoopbackHub, fault: dict[str, object], options: tuple[str, ...], tmp_path: Path
) -> None:
    """A token that the Hub quotes does not reach the plan, the report or the messages."""
    hub.fault("/api/models/", **fault)
    environ = {"HF_TOKEN": SECRET, "HF_ENDPOINT": hub.endpoint}
    done = run(tmp_path, environ, "reconcile", *options, "-m", "org/model", "-o", "reconcile.metadata_timeout_s=1")
    assert hub.tokens_seen == {SECRET}
    assert done.returncode not in (0, 78), done
    assert_nothing_leaks(done)


def test_a_record_of_the_log_is_filtered() -> None:
    """The secret is removed from message, arguments, traceback and the journal's fields."""
    error = ValueError(f"Illegal header value b'Bearer {SECRET}'")
    record = logging.LogRecord("x", logging.ERROR, "", 1, "failed: %s", (SECRET,), (ValueError, error, None))
    record.fields = {"WHISPERD_MODEL": SECRET}
    assert SecretFilter(lambda text: hide(text, [SECRET])).filter(record)
    shown = logging.Formatter().format(record)
    assert "failed: ***" in shown
    assert "Illegal header value b'Bearer ***'" in shown
    assert SECRET not in shown
    assert vars(record)["fields"] == {"WHISPERD_MODEL": "***"}


@given(secret=st.text(min_size=6, max_size=40), before=st.text(max_size=5), after=st.text(max_size=5))
def test_a_secret_is_found_in_any_form(secret: str, before: str, after: str) -> None:
    """A secret is removed from any text, both as it is and quoted as by repr."""
    for form in (secret, repr(secret)[1:-1]):
        assert "***" in hide(f"{before}{form}{after}", [secret])
    assert hide(before, []) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "got nothing"), ("a\nb", "got 2 lines"), ("a b", "got a space"), ("é", "not printable ASCII")],
)
def test_a_key_for_tcp_that_cannot_be_sent(text: str, message: str, tmp_path: Path) -> None:
    """A key that no client could send is refused at the start; one line with a line end is accepted."""
    path = tmp_path / "key"
    config = Config.model_validate({"server": {"tcp_key_file": str(path)}})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        tcp_key(config, {})
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        tcp_key(config, {})
    path.write_text("key\n", encoding="utf-8")
    assert tcp_key(config, {}) == "key"
    assert tcp_key(Config(), {}) is None


@pytest.mark.parametrize("malformed", MALFORMED)
def test_the_library_function_takes_no_malformed_token(
    malformed: str, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``download_model_if_needed`` refuses a malformed token from the environment or an argument with its own error."""
    for name, value in put(tmp_path, MALFORMED[malformed]).items():
        monkeypatch.setenv(name, value)
    for argument, origin in ((None, ""), (MALFORMED[malformed], "the argument: ")):
        with pytest.raises(StoreError, match=f"^{origin}.*expects one line of printable ASCII") as caught:
            download_model_if_needed(f"path:{tmp_path}", token=argument)
        assert SECRET not in str(caught.value)


def test_the_library_function_warns_of_a_readable_token(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, snapshot: Path, tmp_path: Path
) -> None:
    """The function logs a warning without the token for http to another machine, and none for this machine."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert download_model_if_needed(f"path:{snapshot}", cache_dir=tmp_path, token=SECRET) == snapshot
    assert caplog.text == ""
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.lan")
    assert download_model_if_needed(f"path:{snapshot}", cache_dir=tmp_path, token=SECRET) == snapshot
    assert "the token of the argument goes to http://mirror.lan without encryption" in caplog.text
    assert SECRET not in caplog.text
