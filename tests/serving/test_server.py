"""Listening sockets and what the server does on them: modes, inheritance, deadlines, draining."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.service_fake import PATIENCE_S, serving
from whisperd.errors import ConfigError, UsageError
from whisperd.metrics import HttpMeter
from whisperd.serving.http.server import Server
from whisperd.serving.interface import ServerSettings
from whisperd.serving.sockets import bind_unix, inherited_sockets

REQUEST = b"GET / HTTP/1.1\r\nHost: whisperd\r\n\r\n"


class App:
    """Answers with the peer's credentials; ``/wait`` only after ``release``."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.cancelled = threading.Event()
        self._gate = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            await self._wait()
        body = json.dumps(scope["state"].get("peer")).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def release(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gate.set)

    async def _wait(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.waiting.set()
        try:
            await self._gate.wait()
        except asyncio.CancelledError:
            for _ in range(10):  # the tidying up of a real application takes a few turns of the loop
                await asyncio.sleep(0)
            self.cancelled.set()


def connected(path: Path) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(PATIENCE_S)
    try:
        raw.connect(str(path))
    except OSError:
        raw.close()
        raise
    return raw


def until_closed(raw: socket.socket) -> bytes:
    return b"".join(iter(lambda: raw.recv(65_536), b""))


def answer_of(raw: socket.socket) -> bytes:
    """One answer of App, possibly in pieces."""
    answer = b""
    while not answer.endswith(b"]"):
        piece = raw.recv(65_536)
        assert piece, f"closed after {answer!r}"
        answer += piece
    return answer


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_socket_has_its_mode(tmp_path: Path, mode: int) -> None:
    """Whatever the umask is, the socket has the declared mode; a missing directory is made."""
    path = tmp_path / "run" / "whisperd.sock"
    umask = os.umask(0)
    try:
        with bind_unix(path, mode=mode, group=None):
            assert mode_of(path) == mode
            assert mode_of(path.parent) == 0o755
    finally:
        os.umask(umask)


def test_a_socket_is_never_wider_than_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between bind and chmod only the owner can connect."""
    path = tmp_path / "whisperd.sock"
    seen: list[int] = []
    chmod = Path.chmod

    def watched(self: Path, mode: int) -> None:
        seen.append(mode_of(self))
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", watched)
    umask = os.umask(0)
    try:
        bind_unix(path, mode=0o660, group=None).close()
    finally:
        os.umask(umask)
    assert seen == [0o600]


def test_a_group_owns_the_socket(tmp_path: Path) -> None:
    """The declared group gets the socket; a missing group is a mistake in the configuration."""
    import grp

    group = grp.getgrgid(os.getegid())
    path = tmp_path / "whisperd.sock"
    with bind_unix(path, mode=0o660, group=group.gr_name):
        assert path.stat().st_gid == group.gr_gid
    with pytest.raises(ConfigError, match="there is no group 'no-such-group'"):
        bind_unix(path, mode=0o660, group="no-such-group")


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    """A path that is too long, not a socket, or in no directory has its own message."""
    with pytest.raises(ConfigError, match="longer than the 107 bytes"):
        bind_unix(tmp_path / ("x" * 108), mode=0o600, group=None)
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        bind_unix(plain, mode=0o600, group=None)
    assert plain.read_text() == "precious"
    with pytest.raises(ConfigError, match="cannot listen at"):
        bind_unix(plain / "whisperd.sock", mode=0o600, group=None)


def test_the_longest_path_works(tmp_path: Path) -> None:
    """A path of 107 bytes is accepted."""
    path = tmp_path / ("x" * (107 - len(os.fsencode(tmp_path)) - 1))
    with bind_unix(path, mode=0o600, group=None), connected(path):
        assert path.is_socket()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """The socket file that a killed daemon left behind is replaced."""
    path = tmp_path / "whisperd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with bind_unix(path, mode=0o600, group=None), connected(path):
        assert mode_of(path) == 0o600


def test_a_running_daemon_is_not_replaced(tmp_path: Path) -> None:
    """A second daemon on one path fails with an error."""
    path = tmp_path / "whisperd.sock"
    with bind_unix(path, mode=0o600, group=None):
        with pytest.raises(UsageError, match="another daemon listens at"):
            bind_unix(path, mode=0o600, group=None)
        connected(path).close()


def test_closing_removes_only_the_own_path(tmp_path: Path) -> None:
    """A path that another daemon has taken over is kept."""
    path = tmp_path / "whisperd.sock"
    first = bind_unix(path, mode=0o600, group=None)
    path.unlink()
    with bind_unix(path, mode=0o600, group=None):
        first.close()
        assert path.is_socket()
    assert not path.exists()


def test_the_peer_is_known(tmp_path: Path) -> None:
    """The application sees pid, uid and gid of the process that connected."""
    path = tmp_path / "whisperd.sock"
    with serving(App(), path), connected(path) as raw:
        raw.sendall(REQUEST)
        answer = answer_of(raw)
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == [os.getpid(), os.getuid(), os.getgid()]
    assert not path.exists()


@pytest.mark.parametrize("sent", [b"", b"G", REQUEST[:-2], REQUEST + REQUEST[:-2]])
def test_a_slow_head_is_cut_off(tmp_path: Path, sent: bytes) -> None:
    """A connection that does not finish the head of a request in time is closed, the second one like the first."""
    path = tmp_path / "whisperd.sock"
    with serving(App(), path, ServerSettings(header_timeout_s=0.1)), connected(path) as raw:
        raw.sendall(sent)
        answer = until_closed(raw)
    assert answer.count(b"200 OK") == (1 if len(sent) > len(REQUEST) else 0)


def test_the_rest_of_an_answered_request_is_cut_off(tmp_path: Path) -> None:
    """A client that goes on sending after the answer gets no more time than for a head."""
    path = tmp_path / "whisperd.sock"
    with serving(App(), path, ServerSettings(header_timeout_s=0.1)), connected(path) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: whisperd\r\nContent-Length: 1000\r\n\r\n")
        assert b"200 OK" in answer_of(raw)
        raw.sendall(b"x")
        assert until_closed(raw) == b""


def test_a_slow_answer_is_not_cut_off(tmp_path: Path) -> None:
    """The deadline applies to the head only."""
    path, app = tmp_path / "whisperd.sock", App()
    with serving(app, path, ServerSettings(header_timeout_s=0.05)), connected(path) as slow:
        slow.sendall(REQUEST.replace(b"/ ", b"/wait "))
        assert app.waiting.wait(PATIENCE_S)
        with connected(path) as silent:
            assert until_closed(silent) == b""  # by now the deadline of the first request has passed, too
        app.release()
        assert b"200 OK" in answer_of(slow)


def test_requests_in_flight_are_answered_in_a_drain(tmp_path: Path) -> None:
    """After stop, idle connections close at once and a running request gets its answer and a close."""
    path, app = tmp_path / "whisperd.sock", App()
    with serving(app, path) as stop, connected(path) as busy, connected(path) as idle:
        idle.sendall(REQUEST)
        assert b"200 OK" in answer_of(idle)
        busy.sendall(REQUEST.replace(b"/ ", b"/wait "))
        assert app.waiting.wait(PATIENCE_S)
        stop()
        assert until_closed(idle) == b""
        with pytest.raises(OSError, match="No such file"):
            connected(path)
        app.release()
        assert b"200 OK" in until_closed(busy)


def test_a_connection_that_was_just_accepted_is_served_in_a_drain(tmp_path: Path) -> None:
    """A client that connected before the stop may still send its request."""
    path, app = tmp_path / "whisperd.sock", App()
    with serving(app, path) as stop, connected(path) as busy, connected(path) as fresh, connected(path) as idle:
        for raw, line in ((idle, REQUEST), (busy, REQUEST.replace(b"/ ", b"/wait "))):
            raw.sendall(line)
        assert b"200 OK" in answer_of(idle)
        assert app.waiting.wait(PATIENCE_S)
        stop()
        assert until_closed(idle) == b""  # the drain has started
        fresh.sendall(REQUEST)
        assert b"200 OK" in until_closed(fresh)
        app.release()


def test_a_request_that_outlives_the_drain_is_cancelled(tmp_path: Path) -> None:
    """After the drain's time limit the application is cancelled, and the server waits for it to end."""
    path, app, server = tmp_path / "whisperd.sock", App(), Server(ServerSettings(drain_s=1))

    async def main() -> bool:
        serves = asyncio.create_task(server.serve(app, [bind_unix(path, mode=0o600, group=None)]))
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(REQUEST.replace(b"/ ", b"/wait "))
        await asyncio.to_thread(app.waiting.wait, PATIENCE_S)
        server.stop()
        await serves
        ended = app.cancelled.is_set()
        await reader.read()
        writer.close()
        return ended

    assert asyncio.run(main())


def test_a_server_that_is_stopped_first(tmp_path: Path) -> None:
    """A stop that comes before the start takes effect."""
    path, server = tmp_path / "whisperd.sock", Server()
    server.stop()
    asyncio.run(server.serve(App(), [bind_unix(path, mode=0o600, group=None)]))
    assert not path.exists()


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_FDS": ""}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}],
)
def test_nothing_is_inherited_by_mistake(environ: dict[str, str]) -> None:
    """Variables that are empty, or meant for another process, are removed and change nothing."""
    assert inherited_sockets(environ) == []
    assert environ == {}


class Counted(HttpMeter):
    def __init__(self) -> None:
        self.codes: list[str] = []

    def count_rejection(self, code: str) -> None:
        self.codes.append(code)


LONG = b"x" * 1000
WHOLE_LONG_HEAD = REQUEST[:-2] + b"".join(b"A%d: %b\r\n" % (number, LONG) for number in range(70)) + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", b"400 Bad Request", "malformed_request"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"400 Bad Request", "malformed_request"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400 Bad Request", "malformed_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400 Bad Request", "malformed_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400 Bad Request", "malformed_request"),
        (WHOLE_LONG_HEAD, b"431 Request Header Fields Too Large", "headers_too_long"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"431 Request Header Fields Too Large", "headers_too_long"),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 300_000, b"431 Request Header Fields Too Large", "headers_too_long"),
        (REQUEST + b"GARBAGE\r\n\r\n", b"", "malformed_request"),
    ],
)
def test_what_is_no_request(tmp_path: Path, sent: bytes, status: bytes, code: str) -> None:
    """Invalid data is answered in the envelope of errors and counted, and the connection is closed."""
    path, meter = tmp_path / "whisperd.sock", Counted()
    with serving(App(), path, meter=meter), connected(path) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        answer = until_closed(raw)
    assert meter.codes == [code]
    if status:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert json.loads(body)["error"]["code"] == code


def test_heads_of_the_allowed_length(tmp_path: Path) -> None:
    """Many requests on one connection, long heads and bodies that arrive with the next head are all accepted."""
    path, meter = tmp_path / "whisperd.sock", Counted()
    long = REQUEST[:-2] + b"A: " + b"x" * 60_000 + b"\r\n\r\n"
    post = b"POST / HTTP/1.1\r\nHost: whisperd\r\nContent-Length: 200000\r\n\r\n" + bytes(200_000)
    sent = REQUEST * 3 + long * 3 + post + REQUEST + post + long
    with serving(App(), path, meter=meter), connected(path) as raw:
        sending = threading.Thread(target=raw.sendall, args=(sent,))
        sending.start()
        answer = b""
        while answer.count(b"200 OK") < 10:
            piece = raw.recv(65_536)
            assert piece, answer
            answer += piece
        sending.join()
    assert meter.codes == []


RIVAL = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from whisperd.errors import UsageError
    from whisperd.serving.sockets import bind_unix
    held = []
    for line in sys.stdin:
        path, start_s = line.split()
        while time.monotonic() < float(start_s):
            pass
        try:
            held.append(bind_unix(Path(path), mode=0o600, group=None))
            print("bound", flush=True)
        except UsageError as error:
            print(error, flush=True)
""")


def test_two_daemons_at_the_same_moment(tmp_path: Path) -> None:
    """Of several processes that find the same stale socket exactly one gets it, and it is the one that answers."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        rivals = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RIVAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
                )
            )
            for _ in range(4)
        ]
        for number in range(150):
            path = tmp_path / f"{number}.sock"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
                dead.bind(str(path))
            start_s = time.monotonic() + 0.005
            for rival in rivals:
                assert rival.stdin is not None
                rival.stdin.write(f"{path} {start_s}\n")
                rival.stdin.flush()
            said = [rival.stdout.readline().strip() for rival in rivals if rival.stdout is not None]
            assert said.count("bound") == 1, said
            assert sum("another daemon listens" in line for line in said) == len(rivals) - 1, said
            connected(path).close()
        for rival in rivals:
            rival.communicate(timeout=PATIENCE_S)


CHILD = textwrap.dedent("""
    import os, socket, sys
    from whisperd.errors import ConfigError
    from whisperd.serving.sockets import inherited_sockets
    os.environ["LISTEN_PID"] = str(os.getpid())
    try:
        (passed,) = inherited_sockets(os.environ)
    except ConfigError as error:
        sys.exit(str(error))
    found = passed.socket
    assert passed.name == "http"
    assert "LISTEN_FDS" not in os.environ and not found.get_inheritable() and found.fileno() == 3
    with found.accept()[0] as connection:
        connection.sendall(b"inherited")
    found.close()
""")


def child_with(fd: int) -> subprocess.CompletedProcess[str]:
    move = f"import os; os.dup2({fd}, 3); os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {CHILD!r}])"
    return subprocess.run(
        [sys.executable, "-c", move],
        pass_fds=[fd],
        env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=PATIENCE_S * 3,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_inherited_socket_serves_and_keeps_its_path(tmp_path: Path) -> None:
    """A process that got a socket from systemd accepts on it, and its end does not remove the path."""
    path = tmp_path / "whisperd.sock"
    with bind_unix(path, mode=0o600, group=None) as listener, connected(path) as raw:
        done = child_with(listener.fileno())
        assert (done.returncode, done.stderr) == (0, "")
        assert until_closed(raw) == b"inherited"
        assert path.is_socket()


def test_an_inherited_file_that_is_no_listener() -> None:
    """A socket that does not listen, or a file that is no socket, is refused with a message about the unit."""
    one, other = socket.socketpair()
    with one, other:
        assert "needs ListenStream= and Accept=no" in child_with(one.fileno()).stderr
    read, write = os.pipe()
    try:
        assert "file descriptor 3 is not a socket" in child_with(read).stderr
    finally:
        os.close(read)
        os.close(write)
