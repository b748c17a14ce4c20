"""HTTP/1.1 in use: offers of another protocol, pipelines, connections that are closed on one side."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.service_fake import PATIENCE_S, serving
from whisperd.serving.http.server import Server
from whisperd.serving.sockets import bind_tcp

OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
BODY = bytes(range(256)) * 1000


class Echo:
    """Answers with what it got; ``/wait`` only after ``release``, and records when its client has disconnected."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.gone = threading.Event()
        self._gate = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["path"] == "/wait" and not await self._released(receive):
            self.gone.set()
            return
        answer = json.dumps(
            {
                "method": scope["method"],
                "path": scope["path"],
                "bytes": len(body),
                "right": body == BODY[: len(body)],
                "headers": [name.decode() for name, _ in scope["headers"]],
            }
        ).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _released(self, receive: Any) -> bool:
        self._loop = asyncio.get_running_loop()
        gate, gone = asyncio.create_task(self._gate.wait()), asyncio.create_task(receive())
        self.waiting.set()
        done, pending = await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return gate in done

    def release(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gate.set)


def connected(path: Path) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(PATIENCE_S)
    raw.connect(str(path))
    return raw


@contextmanager
def over_tcp(app: Echo) -> Iterator[Callable[[], socket.socket]]:
    listener, server = bind_tcp("127.0.0.1:0"), Server()
    address = listener.getsockname()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(app, [listener])))
    thread.start()
    try:
        yield lambda: socket.create_connection(address, PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(PATIENCE_S)
        loop.close()


def answers(raw: socket.socket, n: int) -> list[dict[str, Any]]:
    """Reads so many answers, in order."""
    data = b""
    found: list[dict[str, Any]] = []
    while len(found) < n:
        piece = raw.recv(65_536)
        assert piece, (data, found)
        data += piece
        while (at := data.find(b"\r\n\r\n")) >= 0:
            head, rest = data[:at], data[at + 4 :]
            assert head.startswith(b"HTTP/1.1 200 "), head
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            if len(rest) < length:
                break
            found.append(json.loads(rest[:length]))
            data = rest[length:]
    return found


def rest_of(raw: socket.socket) -> bytes:
    return b"".join(iter(lambda: raw.recv(65_536), b""))


def post(path: str, body: bytes, extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chunked(path: str, body: bytes, extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{extra}Transfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000, 10**9])
def test_an_offer_of_http_2_is_ignored(tmp_path: Path, piece_bytes: int, caplog: pytest.LogCaptureFixture) -> None:
    """Bodies arrive whole, each request of a pipeline is answered, and no log line recommends another package."""
    body = BODY[:3000]
    sent = b"".join([
        post("/a", body, OFFER),
        post("/b", body),
        chunked("/c", body, OFFER),
        f"GET /d HTTP/1.1\r\nHost: x\r\nX-Mine: 1\r\n{OFFER}\r\n".encode(),
        b"GET /e HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        post("/f", body),
    ])  # fmt: skip
    path = tmp_path / "s"
    with serving(Echo(), path), connected(path) as raw:
        for start in range(0, len(sent), piece_bytes):
            raw.sendall(sent[start : start + piece_bytes])
        found = answers(raw, 6)
    assert [(one["path"], one["bytes"], one["right"]) for one in found] == [
        ("/a", 3000, True), ("/b", 3000, True), ("/c", 3000, True),
        ("/d", 0, True), ("/e", 0, True), ("/f", 3000, True),
    ]  # fmt: skip
    assert found[3]["headers"] == ["host", "x-mine", "connection"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_offer_with_a_large_body(tmp_path: Path) -> None:
    """256 kB behind an offer arrive byte for byte, and a client that asks first gets 100 Continue."""
    path = tmp_path / "s"
    with serving(Echo(), path), connected(path) as raw:
        head, _, body = post("/a", BODY, OFFER + "Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        raw.sendall(head + b"\r\n\r\n")
        assert raw.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(body)
        assert [(one["bytes"], one["right"]) for one in answers(raw, 1)] == [(len(BODY), True)]


def test_a_tunnel_is_refused(tmp_path: Path) -> None:
    """CONNECT is refused, since this server cannot serve it."""
    path = tmp_path / "s"
    with serving(Echo(), path), connected(path) as raw:
        raw.sendall(b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(65_536).startswith(b"HTTP/1.1 400 ")


def test_curl_with_http_2(tmp_path: Path) -> None:
    """curl's upload arrives, and curl accepts the answer in HTTP/1.1."""
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("there is no curl with HTTP/2")
    path, body = tmp_path / "s", tmp_path / "body"
    body.write_bytes(BODY)
    command = [curl, "-sS", "--http2", "--unix-socket", str(path), "http://x/a", "--data-binary", f"@{body}"]
    with serving(Echo(), path):
        done = subprocess.run(
            [*command, "-w", "\n%{http_version}"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
    answer, version = done.stdout.splitlines()
    assert (json.loads(answer)["bytes"], json.loads(answer)["right"], version) == (len(BODY), True, "1.1")


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Main {
    public static void main(String[] arguments) throws Exception {
        byte[] body = new byte[256000];
        for (int at = 0; at < body.length; at++) body[at] = (byte) at;
        HttpClient client = HttpClient.newHttpClient();
        for (int number = 0; number < 2; number++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
                .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
            HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.version() + " " + answer.body());
        }
    }
}
"""


def test_java_at_its_defaults(tmp_path: Path) -> None:
    """Java's HttpClient, which offers HTTP/2 with every first request, uploads twice on one connection."""
    java = shutil.which("java")
    if (
        java is None
        or "jdk.compiler"
        not in subprocess.run([java, "--list-modules"], capture_output=True, text=True, check=False).stdout
    ):
        pytest.skip("there is no Java with a compiler")
    source = tmp_path / "Main.java"
    source.write_text(JAVA, encoding="utf-8")
    with over_tcp(Echo()) as connect:
        with connect() as probe:
            port = probe.getpeername()[1]
        done = subprocess.run(
            [java, str(source), f"http://127.0.0.1:{port}/a"],
            capture_output=True, text=True, timeout=PATIENCE_S * 4, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["HTTP_1_1"] * 2
    assert all(json.loads(line.partition(" ")[2])["right"] for line in lines)
    assert all(json.loads(line.partition(" ")[2])["bytes"] == 256_000 for line in lines)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_half_closed_connection_gets_its_answers(tmp_path: Path, transport: str) -> None:
    """A client that closes its sending side gets all answers; then the connection is closed."""
    app, path = Echo(), tmp_path / "s"
    sent = post("/a", BODY[:3000]) + post("/wait", BODY[:3000])

    def check(raw: socket.socket) -> None:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        assert app.waiting.wait(PATIENCE_S)
        app.release()
        answer = rest_of(raw)
        assert answer.count(b"HTTP/1.1 200 ") == 2
        assert b"connection: close" in answer

    if transport == "tcp":
        with over_tcp(app) as connect, connect() as raw:
            check(raw)
    else:
        with serving(app, path), connected(path) as raw:
            check(raw)
    assert not app.gone.is_set()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("half_first", [False, True])
def test_a_client_that_leaves_is_noticed(tmp_path: Path, transport: str, half_first: bool) -> None:
    """A closed connection cancels the work, at once over a Unix socket, and within seconds over TCP."""
    app, path = Echo(), tmp_path / "s"

    def leave(raw: socket.socket) -> None:
        raw.sendall(post("/wait", BODY[:3000]))
        assert app.waiting.wait(PATIENCE_S)
        if half_first:
            raw.shutdown(socket.SHUT_WR)
        raw.close()
        assert app.gone.wait(PATIENCE_S)

    if transport == "tcp":
        with over_tcp(app) as connect:
            leave(connect())
    else:
        with serving(app, path):
            leave(connected(path))


def test_half_a_body_is_no_request(tmp_path: Path) -> None:
    """A client that closes in the middle of a body has disconnected, however the connection is closed."""
    path = tmp_path / "s"
    with serving(Echo(), path), connected(path) as raw:
        raw.sendall(post("/a", BODY[:3000])[:-1])
        raw.shutdown(socket.SHUT_WR)
        assert rest_of(raw) == b""
