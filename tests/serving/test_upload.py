"""Uploads over a real socket: forms in pieces, limits that hold while reading, refusals before the body."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from tests.support.api import AUDIO, BOUNDARY, FILE_PART, URL, client_of, connected, error_of, head
from tests.support.service_fake import PATIENCE_S, TEXT, Daemon, daemon
from whisperd.serving.http.upload import Upload, receive_upload
from whisperd.serving.interface import Readiness
from whisperd.serving.spool import Spool
from whisperd.serving.tasks import Pace

FIELD_PART = BOUNDARY + b'Content-Disposition: form-data; name="language"\r\n\r\n'


def test_a_form_without_a_file(client: httpx2.Client, whisperd: Daemon) -> None:
    """The error names the missing file."""
    body = BOUNDARY + b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--x--\r\n'
    response = client.post(URL, content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert response.status_code == 400
    assert (error_of(response)["code"], error_of(response)["param"]) == ("missing_required_parameter", "file")
    whisperd.finished()


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"fLaC", "audio/flac", "expected content-type multipart/form-data"),
        (b"fLaC", "multipart/form-data", "with a boundary"),
        (FILE_PART + b"abc", "multipart/form-data; boundary=x", "ends before its closing boundary"),
        (b"no boundary here", "multipart/form-data; boundary=x", "cannot be read"),
        (BOUNDARY + b"A: b\r\n\r\nx\r\n--x--\r\n", "multipart/form-data; boundary=x", "has no name"),
        (b"", "multipart/form-data; boundary=x", "ends before its closing boundary"),
    ],
)
def test_bodies_that_are_no_form(
    client: httpx2.Client, whisperd: Daemon, body: bytes, content_type: str, message: str
) -> None:
    """A body that is not a whole multipart form is a 400 with the reason."""
    response = client.post(URL, content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert message in error_of(response)["message"]
    whisperd.finished()


def test_a_file_that_is_too_large_without_a_length(client: httpx2.Client, whisperd: Daemon) -> None:
    """The limit applies while a chunked upload is being read."""

    def body() -> Iterator[bytes]:
        yield FILE_PART
        for _ in range(20):
            yield b"x" * 100_000

    response = client.post(URL, content=body(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "file_too_large"
    whisperd.finished()


def test_a_length_over_the_cap_is_refused_before_the_body(whisperd: Daemon) -> None:
    """Ten gigabytes are refused by their Content-Length alone."""
    with connected(whisperd) as raw:
        raw.sendall(head(10_000_000_000))
        assert raw.recv(65_536).startswith(b"HTTP/1.1 413 ")
    assert ": 0 bytes" in whisperd.finished()


def answer_to(whisperd: Daemon, *sent: bytes) -> bytes:
    """The answer when no more than this is sent."""
    answer = b""
    with connected(whisperd) as raw:
        for piece in sent:
            raw.sendall(piece)
        while not answer.endswith(b"}}"):
            answer += raw.recv(65_536)
    return answer


def test_a_full_queue_is_refused_before_the_body(whisperd: Daemon) -> None:
    """An upload takes its place with its headers; without a place it is refused at once, before its body."""
    whisperd.service.requests_max = 1
    with connected(whisperd) as slow:
        slow.sendall(head(900_000) + FILE_PART + b"abc")
        while not whisperd.service.backlog.n_requests:
            os.sched_yield()
        refused = answer_to(whisperd, head(900_000).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert refused.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 2\r\n" in refused
        assert b'"code":"queue_full"' in refused
        assert f"POST {URL} 429 " in whisperd.log.next()
    assert f"POST {URL} 499 " in whisperd.finished()
    assert not whisperd.service.jobs


def test_curl_sends_no_body_to_a_full_queue(whisperd: Daemon, tmp_path: Path) -> None:
    """curl asks first when it sends much, and stops when refused."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    whisperd.service.requests_max = 1
    (tmp_path / "large.wav").write_bytes(bytes(2_000_000))
    command = [curl, "-sS", "--unix-socket", str(whisperd.path), f"http://x{URL}", "-F", f"file=@{tmp_path}/large.wav"]
    with whisperd.service.backlog.enter(1):
        done = subprocess.run(
            [*command, "-w", " %{http_code} %{size_upload}"],
            capture_output=True, text=True, timeout=PATIENCE_S, check=True,
        )  # fmt: skip
    assert '"code":"queue_full"' in done.stdout
    assert done.stdout.endswith(" 429 0")


def test_a_spool_without_room_is_refused_before_the_body(tmp_path: Path) -> None:
    """An upload that does not fit the budget or the disk is refused before its body."""
    with daemon(tmp_path, spool=Spool(tmp_path, upload_bytes=10**18, budget_bytes=10**18)) as whisperd:
        found = answer_to(whisperd, head(10**17))
        assert found.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"spool_full"' in found
        assert b"has room for" in found
        assert ": 0 bytes" in whisperd.finished()
        whisperd.spool.budget_bytes = 10_000_000
        assert b"fill the spool of 10000000 bytes" in answer_to(whisperd, head(20_000_000))
        whisperd.finished()


def test_an_unknown_model_is_refused_before_the_file(whisperd: Daemon) -> None:
    """Where the model comes before the file, as in most clients, the request is refused without the file."""
    model = BOUNDARY + b'Content-Disposition: form-data; name="model"\r\n\r\nnope\r\n'
    found = answer_to(whisperd, head(900_000), model + FILE_PART)
    assert found.startswith(b"HTTP/1.1 404 ")
    assert b'"param":"model"' in found
    whisperd.finished()
    assert not whisperd.service.jobs


def test_a_full_spool(tmp_path: Path) -> None:
    """Uploads share one budget; one that does not fit gets an error that allows a retry."""
    spool = Spool(tmp_path, upload_bytes=1000, budget_bytes=10)
    with daemon(tmp_path, spool=spool) as whisperd, client_of(whisperd.path) as client:
        response = client.post(URL, files=[AUDIO])
        assert (response.status_code, error_of(response)["code"]) == (503, "spool_full")
        assert response.headers["retry-after"] == "5"
        whisperd.finished()


def test_a_spool_that_cannot_be_written(tmp_path: Path) -> None:
    """A missing spool directory is the daemon's error and is reported as such."""
    spool = Spool(tmp_path / "gone", upload_bytes=1000, budget_bytes=1000)
    with daemon(tmp_path, spool=spool) as whisperd, client_of(whisperd.path) as client:
        response = client.post(URL, files=[AUDIO])
        assert (response.status_code, error_of(response)["code"]) == (503, "spool_full")
        assert "gone cannot be written (No such file" in error_of(response)["message"]
        whisperd.finished()


def test_an_upload_to_a_daemon_that_is_not_ready_is_refused(whisperd: Daemon) -> None:
    """The request is refused before its body, with the reason and the time to wait."""
    whisperd.service.now = Readiness(ready=False, reason="large-v3 loads", retry_after_s=2.5)
    with connected(whisperd) as raw:
        raw.sendall(head(1000))
        answer = b""
        while not answer.endswith(b"}}"):
            answer += raw.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 3\r\n" in answer
    assert b"retry-after-ms: 2500\r\n" in answer
    assert b"large-v3 loads" in answer
    whisperd.finished()


def test_a_client_that_leaves_its_upload(whisperd: Daemon) -> None:
    """Half an upload leaves no file behind and starts no job."""
    with connected(whisperd) as raw:
        raw.sendall(head(10_000) + FILE_PART + b"abc")
    assert f"POST {URL} 499 " in whisperd.finished()
    assert not whisperd.service.jobs


def test_an_upload_that_stands_still(tmp_path: Path) -> None:
    """A client that stops sending loses its place."""
    with daemon(tmp_path, upload_idle_s=0.05) as whisperd, connected(whisperd) as raw:
        raw.sendall(head(10_000) + FILE_PART + b"abc")
        assert raw.recv(65_536).startswith(b"HTTP/1.1 408 ")
        whisperd.finished()


def test_an_upload_that_drips(tmp_path: Path) -> None:
    """A client that sends too slowly loses its place too."""
    with daemon(tmp_path, upload_idle_s=0.1, upload_bytes_per_s=1e6) as whisperd, connected(whisperd) as raw:
        raw.sendall(head(500_000) + FILE_PART)
        raw.settimeout(0.01)
        answer = b""
        while not answer:
            raw.sendall(b"x")
            with suppress(TimeoutError):
                answer = raw.recv(65_536)
        raw.settimeout(PATIENCE_S)
        while not answer.endswith(b"}}"):
            answer += raw.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"slower than 1e+06 bytes a second" in answer
        whisperd.finished()


def received(chunks: Sequence[bytes], spool: Spool) -> Upload:
    messages = iter([*chunks, b""])

    async def receive() -> Any:
        body = next(messages)
        return {"type": "http.request", "body": body, "more_body": bool(body)}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    return asyncio.run(receive_upload(request, spool, Pace(idle_s=PATIENCE_S), lambda _: None, lambda: None))


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(1, 40), max_size=8))
def test_a_form_may_arrive_in_any_pieces(data: bytes, sizes: list[int]) -> None:
    """However a form is split on its way, and whatever the file holds, the same fields and bytes come out."""
    body = FILE_PART + data + b"\r\n" + FIELD_PART + b"ja\r\n--x--\r\n"
    chunks = []
    for size in sizes:
        chunks.append(body[:size])
        body = body[size:]
    with TemporaryDirectory() as directory:
        spool = Spool(Path(directory), upload_bytes=100, budget_bytes=100)
        upload = received([chunk for chunk in (*chunks, body) if chunk], spool)
        with upload.file:
            assert upload.file.rewound().read() == data
        assert (upload.filename, upload.fields) == ("a.wav", (("language", "ja"),))
        assert (spool.open_files, spool.used_bytes) == (0, 0)


def test_node_sends_the_file_first(client: httpx2.Client, whisperd: Daemon) -> None:
    """Fields behind the file count, and names with brackets and objects are understood."""
    fields = {"model": "whisper-1", "timestamp_granularities[]": "segment", "chunking_strategy[type]": "server_vad"}
    parts = [(name, (None, value.encode())) for name, value in fields.items()]
    assert client.post(URL, files=[AUDIO, *parts]).json()["text"] == TEXT
    job = whisperd.service.jobs[0]
    assert (job.model, job.chunking.vad_filter) == ("whisper-1", True)


def test_a_slow_upload_yields_its_place(tmp_path: Path) -> None:
    """A slow upload yields its place to a waiting request, and gets one back with its last byte."""
    with daemon(tmp_path, place_s=0.2) as whisperd, client_of(whisperd.path) as client:
        whisperd.service.requests_max = 1
        body = FILE_PART + b"abc\r\n--x--\r\n"
        with connected(whisperd) as slow:
            slow.sendall(head(len(body)) + body[:-1])
            while (response := client.post(URL, files=[AUDIO])).status_code == 429:
                os.sched_yield()
            assert response.json()["text"] == TEXT
            whisperd.service.waits_first = True
            with ThreadPoolExecutor(1) as pool:
                busy = pool.submit(client.post, URL, files=[AUDIO])
                while len(whisperd.service.jobs) < 2:
                    os.sched_yield()
                slow.sendall(body[-1:])  # it is complete, and waits for the place of the other one
                with client_of(whisperd.path) as third:
                    while third.post(URL, files=[AUDIO]).status_code != 429:
                        os.sched_yield()
                assert len(whisperd.service.jobs) == 2
                whisperd.service.release()
                assert busy.result().json()["text"] == TEXT
            assert slow.recv(65_536).startswith(b"HTTP/1.1 200 ")
        assert whisperd.service.audio[-1] == b"abc"
