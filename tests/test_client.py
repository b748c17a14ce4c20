"""The client of the command line, against the real server and against servers that misbehave."""

from __future__ import annotations

import grp
import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.support.service_fake import MODEL, PATIENCE_S, STATUS, TEXT, Daemon, daemon
from whisperd.client import Client
from whisperd.errors import (
    AudioError,
    ConfigError,
    DaemonUnreachable,
    EngineError,
    Problem,
    QueueFull,
    RemoteError,
    RequestError,
    SocketPermissionError,
)
from whisperd.serving.interface import Readiness


@pytest.fixture
def whisperd(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(whisperd: Daemon) -> Client:
    return Client(whisperd.path, PATIENCE_S)


def transcribe(client: Client, file: BinaryIO, **fields: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    events: list[tuple[str, Any]] = []
    told = client.transcribe(
        file, filename='a "b"\r\n.wav', fields=fields, on_event=lambda kind, data: events.append((kind, data))
    )
    return told, events


def test_calls(client: Client, whisperd: Daemon) -> None:
    """Status, models, readiness and reload work as plain calls."""
    assert client.status() == STATUS
    assert [model["id"] for model in client.models()] == [MODEL, "local"]
    assert client.reload()["changed"] == []
    assert client.ready()
    whisperd.service.now = Readiness(ready=False, reason="loading")
    assert not client.ready()


def test_transcribe_a_file(client: Client, whisperd: Daemon) -> None:
    """A file arrives byte for byte from its position on, the events come in order, and the transcript is complete."""
    data = os.urandom(700_000)
    file = io.BytesIO(b"skipped" + data)
    file.seek(7)
    told, events = transcribe(client, file, language="en", word_timestamps="true")
    assert whisperd.service.audio == [data]
    assert (told["text"], told["x_whisperd"]["language"], told["language"]) == (TEXT, "en", "english")
    assert [kind for kind, _ in events] == [
        "transcript.text.delta",
        "whisperd.segment",
        "whisperd.progress",
    ] * 2 + ["whisperd.transcript", "transcript.text.done"]
    job = whisperd.service.jobs[0]
    assert (job.filename, job.options.language, job.options.word_timestamps) == (
        "a %22b%22%0D%0A.wav",
        "en",
        True,
    )


def test_transcribe_a_pipe(client: Client, whisperd: Daemon) -> None:
    """Input without a length is sent in chunks as it comes."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader:

        def trickle() -> None:
            with os.fdopen(write, "wb", buffering=0) as writer:
                writer.write(b"fLaC")
                writer.write(b"more")

        writer = threading.Thread(target=trickle)
        writer.start()
        told, _ = transcribe(client, reader)
        writer.join(PATIENCE_S)
    assert told["text"] == TEXT
    assert whisperd.service.audio == [b"fLaCmore"]


def test_translate(client: Client) -> None:
    """Translations use their own route."""
    told = client.transcribe(
        io.BytesIO(b"x"), filename="a.wav", fields={}, on_event=lambda _kind, _data: None, translate=True
    )
    assert told["task"] == "translate"


def test_an_output_that_breaks(client: Client, whisperd: Daemon) -> None:
    """An exception of the caller's callback is raised unchanged and not attributed to the daemon."""

    def broken(_kind: str, _data: dict[str, Any]) -> None:
        raise BrokenPipeError("stdout is gone")

    whisperd.service.waits_last = True
    with pytest.raises(BrokenPipeError, match="stdout is gone"):
        client.transcribe(io.BytesIO(b"x"), filename="a.wav", fields={}, on_event=broken)
    assert whisperd.service.cancelled.wait(PATIENCE_S)


class Endless(io.RawIOBase):
    """A pipe that never ends; counts the bytes that were read."""

    def __init__(self) -> None:
        self.taken_bytes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.taken_bytes += size
        return b"x" * size


@pytest.mark.parametrize("not_ready", [True, False])
def test_an_early_answer_stops_the_upload(client: Client, whisperd: Daemon, not_ready: bool) -> None:
    """An answer during the upload is read at once: an endless file is refused and not sent for ever."""
    whisperd.service.now = Readiness(ready=not not_ready, reason="still loading")
    file = Endless()
    with pytest.raises(RemoteError) as caught:
        transcribe(client, file)  # type: ignore[arg-type]
    expected = (503, "model_loading", 75) if not_ready else (413, "file_too_large", 2)
    assert (caught.value.status, caught.value.remote_code, caught.value.remote_exit_code) == expected
    assert file.taken_bytes < 50_000_000


def test_a_large_file_is_refused_by_its_length(client: Client) -> None:
    """With a known length, the refusal is read although the body was not sent whole."""
    with pytest.raises(RemoteError, match="at most 1000000 are accepted") as caught:
        transcribe(client, io.BytesIO(b"x" * 20_000_000))
    assert caught.value.status == 413


def test_a_file_that_shrinks(client: Client, whisperd: Daemon) -> None:
    """A file that ends before its length is an error of the file, not of the daemon."""

    class Shrinking(io.BytesIO):
        def read(self, _size: int | None = -1, /) -> bytes:
            return b""

    with pytest.raises(RequestError, match="became shorter"):
        transcribe(client, Shrinking(b"abc"))
    whisperd.finished()


@pytest.mark.parametrize(
    ("error", "status", "exit_code"),
    [
        (AudioError("no audio"), 400, 65),
        (QueueFull("full"), 429, 75),
        (EngineError("broken"), 500, 70),
        (RequestError("an English-only model"), 400, 2),
        (ValueError("bug"), 500, 1),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_errors_of_the_daemon(
    client: Client, whisperd: Daemon, error: Exception, status: int, exit_code: int, late: bool
) -> None:
    """The daemon's message is raised with its exit code, before the first event and after it."""
    if late:
        whisperd.service.late_error = error
    else:
        whisperd.service.error = error
    with pytest.raises(RemoteError) as caught:
        transcribe(client, io.BytesIO(b"x"))
    assert (caught.value.status, caught.value.remote_exit_code) == (200 if late else status, exit_code)
    assert isinstance(error, ValueError) or str(caught.value) == str(error)


def test_a_reload_that_is_refused(client: Client, whisperd: Daemon) -> None:
    """The problems of the configuration are returned line by line, with the exit code."""
    whisperd.service.reload_error = ConfigError(
        Problem(where="f", key="a", message="is wrong"), Problem(where="f", key="b", message="is missing")
    )
    with pytest.raises(RemoteError, match="f: a: is wrong\nf: b: is missing") as caught:
        client.reload()
    assert caught.value.remote_exit_code == 78


def test_an_unknown_model(client: Client) -> None:
    """A model that is not served is the caller's mistake."""
    with pytest.raises(RemoteError, match="no model 'nope'") as caught:
        transcribe(client, io.BytesIO(b"x"), model="nope")
    assert caught.value.remote_exit_code == 2


def test_no_daemon(tmp_path: Path) -> None:
    """A missing or stale socket is named, with what to try."""
    path = tmp_path / "whisperd.sock"
    with pytest.raises(DaemonUnreachable, match=f"no daemon answers at {path} .*systemctl start whisperd"):
        Client(path).status()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with pytest.raises(DaemonUnreachable, match="Connection refused"):
        Client(path).status()
    with pytest.raises(DaemonUnreachable, match="too long"):
        Client(tmp_path / ("x" * 200)).status()


def test_no_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error for another group's socket says which group to join, but not for a group without access."""
    path = tmp_path / "whisperd.sock"
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, -1, next(one.gr_gid for one in grp.getgrall() if one.gr_gid))
    path.chmod(0o660)
    group = grp.getgrgid(path.stat().st_gid).gr_name

    def refuse(_self: object, _address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(SocketPermissionError, match=f"permission denied.*join the group {group} ") as caught:
        Client(path).status()
    assert caught.value.exit_code == 77
    path.chmod(0o640)
    with pytest.raises(SocketPermissionError, match=f"is for uid {os.geteuid()} alone; .*socket_group"):
        Client(path).status()


@contextmanager
def misbehaving(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[Client]:
    """A server that takes one connection, reads a little, answers as scripted and closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1_000_000)
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Client(path, PATIENCE_S)
        finally:
            thread.join(PATIENCE_S)


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200",
        b"nonsense\r\n\r\n",
        STREAM,
        STREAM + b'26\r\nevent: transcript.text.delta\ndata: {"type"\r\n',
        STREAM + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
        STREAM + b"8\r\ndata: {\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_connection_that_is_lost(tmp_path: Path, sent: bytes) -> None:
    """Wherever the answer breaks off, the error says that the daemon closed the connection."""
    with (
        misbehaving(tmp_path / "s", lambda connection: connection.sendall(sent)) as client,
        pytest.raises(DaemonUnreachable, match="closed the connection before it had answered"),
    ):
        transcribe(client, io.BytesIO(b"x"))


def test_an_answer_behind_a_broken_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that arrives while a send is blocked is read after the connection broke."""
    monkeypatch.setattr("whisperd.client._answered", lambda _: False)  # as if it had arrived just after the check
    page = b'HTTP/1.1 503 No\r\nContent-Length: 49\r\n\r\n{"error":{"message":"later","code":"queue_full"}}'
    with (
        misbehaving(tmp_path / "s", lambda connection: connection.sendall(page)) as client,
        pytest.raises(RemoteError, match="later") as caught,
    ):
        transcribe(client, Endless())  # type: ignore[arg-type]
    assert caught.value.remote_exit_code == 75


def test_an_answer_that_is_not_whisperd(tmp_path: Path) -> None:
    """Another program's error page is shown with its status."""
    page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops"
    with (
        misbehaving(tmp_path / "s", lambda connection: connection.sendall(page)) as client,
        pytest.raises(RemoteError, match="HTTP 502: oops") as caught,
    ):
        client.status()
    assert caught.value.remote_exit_code == 1


def test_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    """With a limit on silence, a hanging daemon is reported."""
    hang = threading.Event()
    with misbehaving(tmp_path / "s", lambda _: (hang.wait(PATIENCE_S), None)[1]):
        try:
            with pytest.raises(DaemonUnreachable, match=r"sent nothing for 0\.05 s"):
                Client(tmp_path / "s", 0.05).status()
        finally:
            hang.set()
