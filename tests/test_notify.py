"""systemd gets every message whole, in UTF-8, and no text can add another message."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whisperd.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


@pytest.fixture
def notifier(systemd: socket.socket) -> Iterator[Notifier]:
    with closing(Notifier({"NOTIFY_SOCKET": systemd.getsockname()})) as connected:
        yield connected


def received(listener: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(listener.recv(4096).decode("utf-8"))
        except BlockingIOError:
            return messages


def test_ready_travels_alone(systemd: socket.socket, notifier: Notifier) -> None:
    """READY=1 is a datagram of its own, the text follows in UTF-8."""
    notifier.ready("prêt ✓")
    assert received(systemd) == ["READY=1", "STATUS=prêt ✓"]
    notifier.ready()
    assert received(systemd) == ["READY=1"]


def test_reloading_carries_the_clock(systemd: socket.socket, notifier: Notifier) -> None:
    """RELOADING=1 and an integer MONOTONIC_USEC of CLOCK_MONOTONIC are one datagram."""
    before_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    (message,) = received(systemd)
    state, clock = message.split("\n")
    name, usec = clock.split("=")
    assert (state, name) == ("RELOADING=1", "MONOTONIC_USEC")
    assert before_usec <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_each_moment_has_its_message(systemd: socket.socket, notifier: Notifier) -> None:
    """Stop, status, error number, more time and the watchdog ping are one datagram each."""
    notifier.stopping()
    notifier.status("draining")
    notifier.errno(22)
    notifier.extend_timeout(2.5)
    notifier.watchdog()
    expected = ["STOPPING=1", "STATUS=draining", "ERRNO=22", "EXTEND_TIMEOUT_USEC=2500000", "WATCHDOG=1"]
    assert received(systemd) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), max_size=400))
def test_a_text_stays_one_short_line(systemd: socket.socket, notifier: Notifier, text: str) -> None:
    """Whatever an exception's text is, systemd gets one printable line of at most 256 characters."""
    notifier.status(f"{text}\nSTOPPING=1")
    (message,) = received(systemd)
    assert message.startswith("STATUS=")
    assert message.isprintable()
    assert len(message) <= len("STATUS=") + 256


def test_a_long_text_is_cut(systemd: socket.socket, notifier: Notifier) -> None:
    """systemd would drop a datagram above 4096 bytes whole; 256 characters are enough to say what happens."""
    notifier.status("é" * 5000)
    assert received(systemd) == [f"STATUS={'é' * 256}"]


def test_an_abstract_socket_is_reached() -> None:
    """An address with a leading @ is in the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"whisperd-test-{os.getpid()}"
        listener.bind(f"\0{name}")
        listener.setblocking(False)
        with closing(Notifier({"NOTIFY_SOCKET": f"@{name}"})) as notifier:
            notifier.watchdog()
        assert received(listener) == ["WATCHDOG=1"]


def test_without_systemd_nothing_happens() -> None:
    """Without NOTIFY_SOCKET there is no message and no watchdog."""
    notifier = Notifier({"WATCHDOG_USEC": "2000000"})
    assert (notifier.enabled, notifier.watchdog_s) == (False, None)
    notifier.ready("nobody listens")
    notifier.reloading()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sdnotify drops the socket unclosed
def test_an_address_without_a_listener_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A missing socket is a warning; the program continues."""
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")})
    notifier.ready("up")
    assert not notifier.enabled
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No such file" in caplog.text


def test_a_lost_socket_is_logged_once(
    systemd: socket.socket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    """When systemd stops listening, one warning says so and no call fails."""
    systemd.close()
    notifier.watchdog()
    notifier.watchdog()
    assert len(caplog.records) == 1
    assert notifier.enabled


def test_a_closed_notifier_is_silent(systemd: socket.socket, notifier: Notifier) -> None:
    """After close, which may come twice, every call does nothing."""
    notifier.close()
    notifier.watchdog()
    assert received(systemd) == []


def test_children_do_not_inherit_the_address(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is removed from the environment of the process, so that no child sends as the daemon."""
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    with closing(Notifier(os.environ)) as notifier:
        assert notifier.enabled
        assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize(
    ("environ", "expected_s"),
    [
        ({"WATCHDOG_USEC": "2000000"}, 1.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}, 1.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_applies_to_its_process_only(
    systemd: socket.socket, environ: dict[str, str], expected_s: float | None
) -> None:
    """Pings are sent at half the limit, and only where the limit is meant for this process."""
    with closing(Notifier(environ | {"NOTIFY_SOCKET": systemd.getsockname()})) as notifier:
        assert notifier.watchdog_s == expected_s


def test_a_manager_that_does_not_read_blocks_nothing(
    systemd: socket.socket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    """When the socket is full, a message is dropped after a moment, with one warning."""
    full = 0
    while not caplog.records and full < 5000:
        notifier.watchdog()
        full += 1
    assert "timed out" in caplog.text
    assert len(received(systemd)) == full - 1
