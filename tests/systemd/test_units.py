"""The unit files by themselves; needs only systemd-analyze."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from whisperd.cli.serve import WYOMING
from whisperd.config import Config, socket_path
from whisperd.config.options import ServerTable
from whisperd.errors import CachePermissionError, ConfigError, UsageError

pytestmark = pytest.mark.systemd

UNITS = Path(__file__).parents[2] / "systemd"
THRESHOLDS = {"whisperd.service": 14, "whisperd-reconcile.service": 12}  # tenths; the best of the others has 1.5


def settings(name: str) -> dict[str, list[str]]:
    """The settings of a unit, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", sorted(THRESHOLDS))
def test_the_sandbox_is_strict(name: str) -> None:
    """The exposure that systemd-analyze finds is at most what the README states."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={THRESHOLDS[name]}", str(UNITS / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_socket_is_the_default() -> None:
    """Clients' default is the path of the socket unit, and reload uses that whatever the configuration says."""
    (path,) = settings("whisperd.socket")["ListenStream"]
    assert path == str(socket_path(Config(), {}, uid=0))
    assert settings("whisperd.service")["ExecReload"] == [f"/usr/bin/whisperd reload --socket {path}"]


def test_the_socket_of_the_wyoming_protocol() -> None:
    """The example is for the service, with the name that the daemon expects."""
    found = settings("examples/whisperd-wyoming.socket")
    assert (found["Service"], found["FileDescriptorName"]) == (["whisperd.service"], [WYOMING])
    assert ServerTable(wyoming=found["ListenStream"][0]).wyoming


def test_exit_codes_that_end_it() -> None:
    """Failures that a retry cannot fix are not retried; all others are."""
    codes = {str(kind.exit_code) for kind in (UsageError, CachePermissionError, ConfigError)}
    assert set(settings("whisperd.service")["RestartPreventExitStatus"][0].split()) == codes


def test_the_time_to_stop_is_enough() -> None:
    """systemd waits longer than the daemon's own limit for requests in flight."""
    (limit,) = settings("whisperd.service")["TimeoutStopSec"]
    assert float(limit.removesuffix("s")) > Config().server.shutdown_timeout_s
