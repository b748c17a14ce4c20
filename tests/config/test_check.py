"""What cannot work on this machine is reported before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from whisperd.config import Loaded, check, load
from whisperd.errors import ConfigError

AS_ANOTHER = """
import os, sys
from pathlib import Path
from whisperd.config import check, load
from whisperd.errors import ConfigError
path, mode = Path(sys.argv[1]), int(sys.argv[2])
path.parent.chmod(mode | 0o555 if mode else mode)
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    check(load(Path("/dev/null"), [f"server.spool_dir='{path}'"], environ={}, cwd=Path("/")), {})
except ConfigError as error:
    print(error)
"""


def loaded(*overrides: str, **environ: str) -> Loaded:
    return load(Path("/dev/null"), overrides, environ=environ, cwd=Path("/"))


def problem(directory: Path, *overrides: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(loaded(*overrides, **environ), {"HOME": str(directory), **environ})
    return str(caught.value)


def test_the_defaults_work(tmp_path: Path) -> None:
    """The defaults give no problem and no warning on an ordinary machine."""
    assert check(loaded(), {"HOME": str(tmp_path)}) == loaded()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.spool_dir='{d}/none'", "server.spool_dir: expects a directory that exists, got '{d}/none'"),
        ("server.spool_dir='{d}/file'", "server.spool_dir: expects a directory that exists, got '{d}/file'"),
        ("cache_dir='{d}/file'", "cache_dir: expects a directory, got '{d}/file': {d}/file is none"),
        ("cache_dir='{d}/file/below'", "cache_dir: expects a directory, got '{d}/file/below': {d}/file is none"),
        ("server.socket='{d}/file'", "server.socket: expects the path of a socket, got '{d}/file'"),
        ("server.socket='{d}/file/s'", "server.socket: expects the path of a socket, got '{d}/file/s': {d}/file is no"),
        ("server.socket='/{long}'", "server.socket: expects at most 107 bytes"),
        ("server.wyoming='unix:/{long}'", "server.wyoming: expects at most 107 bytes"),
        ("server.wyoming='unix:{d}/file'", "server.wyoming: expects the path of a socket"),
        ("server.socket_group='no-such-group'", "server.socket_group: expects a group of this machine"),
        ("server.tcp_key_file='{d}/none'", "server.tcp_key_file: cannot be read: No such file or directory"),
        ("server.tcp_key_file='{d}'", "server.tcp_key_file: cannot be read: Is a directory"),
    ],
)
def test_what_does_not_exist_is_named(override: str, message: str, tmp_path: Path) -> None:
    """A path, group or key that cannot be used is one problem, with its origin and what was expected."""
    (tmp_path / "file").touch()
    names = {"d": str(tmp_path), "long": "x" * 120}
    found = problem(tmp_path, override.format(**names))
    assert message.format(**names) in found
    assert len(found.splitlines()) == 1


def test_all_at_once(tmp_path: Path) -> None:
    """Every problem is reported, those of the environment too, each with its origin."""
    environ = {"HF_HUB_CACHE": "/dev/null", "HF_ENDPOINT": "huggingface.co", "HF_TOKEN": "two words"}
    found = problem(tmp_path, "server.spool_dir='/none'", "server.socket_group='none'", **environ)
    starts = [line.partition(": ")[0] for line in found.splitlines()]
    assert starts == ["-o", "$HF_HUB_CACHE", "-o", "$HF_TOKEN", "$HF_ENDPOINT"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0o555, "server.spool_dir: {spool} cannot be written by user "),
        (0o000, "server.spool_dir: expects a directory that exists, got"),
    ],
)
def test_a_spool_that_this_user_cannot_use(mode: int, words: str, tmp_path: Path) -> None:
    """The message names the user; a directory that this user cannot enter causes no traceback."""
    (tmp_path / "above/spool").mkdir(parents=True)
    (tmp_path / "above/spool").chmod(0o555)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, str(tmp_path / "above/spool"), str(mode)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert words.format(spool=tmp_path / "above/spool") in done.stdout


def test_two_listeners_at_one_address(tmp_path: Path) -> None:
    """HTTP and Wyoming cannot share an address or a path."""
    assert "must differ from server.tcp" in problem(
        tmp_path, "server.tcp='127.0.0.1:9000'", "server.wyoming='127.0.0.1:9000'"
    )
    assert "must differ from server.socket" in problem(
        tmp_path, f"server.socket='{tmp_path}/s'", f"server.wyoming='unix:{tmp_path}/s'"
    )


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://mirror.lan:8080", True),
        ("http://192.168.0.7", True),
        ("https://mirror.lan", False),
        ("http://127.0.0.1:8080", False),
        ("http://localhost:8080", False),
        ("http://[::1]:8080", False),
    ],
)
def test_a_token_without_encryption_is_warned_about(address: str, warned: bool, tmp_path: Path) -> None:
    """A token over http to another machine is warned about; without a token or a network there is no warning."""
    environ = {"HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    one = loaded(f"reconcile.endpoint='{address}'")
    said = check(one, environ).warnings
    assert [text.startswith("the token of $HF_TOKEN goes to http://") for text in said] == [True] * warned
    assert "hf_secret" not in str(said)
    assert check(one, {"HOME": str(tmp_path)}).warnings == ()
    assert check(one, environ | {"HF_HUB_OFFLINE": "1"}).warnings == ()


def test_force_in_the_file_is_warned_about(tmp_path: Path) -> None:
    """``force`` in the file, which downloads everything at each start and reload, gets one warning with its cost."""
    (warning,) = check(loaded("force=true", "models=['a/b', 'c/d']"), {"HOME": str(tmp_path)}).warnings
    assert warning.startswith("force = true: each start and each reload downloads all files of 2 models anew")
