"""The HTTP interface over a real socket: bad input, errors, streams, clients that go away."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from tests.support.service_fake import MODEL, PATIENCE_S, TEXT, TRANSCRIPT, Daemon, FakeService, daemon, serving
from whisperd.errors import ConfigError, Problem, RequestError, UnsupportedParameter
from whisperd.serving.http import create_app
from whisperd.serving.http.params import FIELDS, parse_fields
from whisperd.serving.http.upload import Upload, receive_upload
from whisperd.serving.interface import ApiSettings, Chunking, Readiness, ServerSettings
from whisperd.serving.spool import Spool
from whisperd.serving.tasks import Pace
from whisperd.speech.fallback import TEMPERATURES, Options

URL = "/v1/audio/transcriptions"
AUDIO = ("file", ("talk.flac", b"fLaC and so on"))
BOUNDARY = b"--x\r\n"
FILE_PART = BOUNDARY + b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
FIELD_PART = BOUNDARY + b'Content-Disposition: form-data; name="language"\r\n\r\n'
FORM_IN_STREAM = (
    FILE_PART + b"abc\r\n",
    BOUNDARY + b'Content-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n--x--\r\n',
)


@pytest.fixture
def whisperd(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path) as running:
        yield running


@contextmanager
def client_of(path: Path) -> Iterator[httpx2.Client]:
    transport = httpx2.HTTPTransport(uds=str(path))
    with httpx2.Client(transport=transport, base_url="http://whisperd", timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def client(whisperd: Daemon) -> Iterator[httpx2.Client]:
    with client_of(whisperd.path) as client:
        yield client


def connected(whisperd: Daemon) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(PATIENCE_S)
    raw.connect(str(whisperd.path))
    return raw


def rest_of(raw: socket.socket) -> bytes:
    return b"".join(iter(lambda: raw.recv(65_536), b""))


def head(length_bytes: int) -> bytes:
    return (
        f"POST {URL} HTTP/1.1\r\nHost: whisperd\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Content-Length: {length_bytes}\r\n\r\n"
    ).encode()


def error_of(response: httpx2.Response) -> dict[str, Any]:
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return dict(error)


Files = Sequence[tuple[str, tuple[str, bytes]]]


@pytest.mark.parametrize(
    ("files", "fields", "status", "code", "param", "message"),
    [
        ([("other", ("a.wav", b"x"))], {}, 400, "invalid_value", "other", "the audio belongs in 'file'"),
        ([AUDIO, AUDIO], {}, 400, "invalid_value", "file", "two files"),
        ([("file", ("a.wav", b""))], {}, 400, "invalid_value", "file", "empty"),
        ([("file", ("a.wav", b"x" * 1_000_001))], {}, 413, "file_too_large", "file", "limits.upload_bytes"),
        ([AUDIO], {"langauge": "en"}, 400, "invalid_value", "langauge", "did you mean 'language'"),
        ([AUDIO], {"zzz": "1"}, 400, "invalid_value", "zzz", "there are: file, model"),
        ([AUDIO], {"language": "germn"}, 400, "invalid_value", "language", "did you mean 'german'"),
        ([AUDIO], {"temperature": "1.5"}, 400, "invalid_value", "temperature", "a number from 0 to 1, got '1.5'"),
        ([AUDIO], {"temperature": "nan"}, 400, "invalid_value", "temperature", "a number from 0 to 1"),
        ([AUDIO], {"temperature": "hot"}, 400, "invalid_value", "temperature", "a number from 0 to 1"),
        ([AUDIO], {"response_format": "xml"}, 400, "invalid_value", "response_format", "json, text, srt"),
        ([AUDIO], {"response_format": "diarized_json"}, 400, "unsupported_parameter", "response_format", "speaker"),
        ([AUDIO], {"include[]": "pictures"}, 400, "invalid_value", "include[]", "one of logprobs"),
        (
            [AUDIO],
            {"include[]": "logprobs", "response_format": "srt"},
            400,
            "invalid_value",
            "include[]",
            "response_format=json, got srt",
        ),
        ([AUDIO], {"known_speaker_names[]": "A"}, 400, "unsupported_parameter", "known_speaker_names[]", "speaker"),
        ([AUDIO], {"languages[]": ["en", "klingon"]}, 400, "invalid_value", "languages[]", "'klingon'"),
        ([AUDIO], {"priority": "high"}, 400, "invalid_value", "priority", "auto, interactive, bulk"),
        ([AUDIO], {"chunking_strategy": "fast"}, 400, "invalid_value", "chunking_strategy", "'auto' or an object"),
        (
            [AUDIO],
            {"chunking_strategy": '{"type": "vad"}'},
            400,
            "invalid_value",
            "chunking_strategy[type]",
            "server_vad",
        ),
        (
            [AUDIO],
            {"chunking_strategy[threshold]": "1.5"},
            400,
            "invalid_value",
            "chunking_strategy[threshold]",
            "a number from 0 to 1, got '1.5'",
        ),
        (
            [AUDIO],
            {"chunking_strategy[silence]": "1"},
            400,
            "invalid_value",
            "chunking_strategy[silence]",
            "silence_duration_ms",
        ),
        ([AUDIO], {"stream": "maybe"}, 400, "invalid_value", "stream", "true or false"),
        ([AUDIO], {"beam_size": "0"}, 400, "invalid_value", "beam_size", "from 1 to 10"),
        (
            [AUDIO],
            {"timestamp_granularities[]": "word"},
            400,
            "invalid_value",
            "timestamp_granularities[]",
            "verbose_json, got json",
        ),
        ([AUDIO], {"model": ["a", "b"]}, 400, "invalid_value", "model", "given twice"),
        ([AUDIO], {"prompt": "x" * 65_537}, 400, "invalid_value", "prompt", "longer than 65536 bytes"),
        ([AUDIO], {"model": ["a"] * 65}, 400, "invalid_value", None, "more than 64 fields"),
        ([AUDIO], {"prompt": b"\xff"}, 400, "invalid_value", "prompt", "not UTF-8"),
        ([AUDIO], {"model": "nope"}, 404, "model_not_found", "model", "nope"),
    ],
)
def test_bad_requests(
    client: httpx2.Client,
    whisperd: Daemon,
    files: Files,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    message: str,
) -> None:
    """Each mistake has its status, code and field, says what to do, and leaves no upload behind."""
    response = client.post(URL, files=files, data=fields)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert message in error["message"]
    assert f"POST {URL} {status} " in whisperd.finished()


def test_a_form_without_a_file(client: httpx2.Client, whisperd: Daemon) -> None:
    """The missing file is named."""
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
    """What is not a whole multipart form is a 400 that says why."""
    response = client.post(URL, content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert message in error_of(response)["message"]
    whisperd.finished()


def test_a_file_that_is_too_large_without_a_length(client: httpx2.Client, whisperd: Daemon) -> None:
    """The cap holds while a chunked upload is being read."""

    def body() -> Iterator[bytes]:
        yield FILE_PART
        for _ in range(20):
            yield b"x" * 100_000

    response = client.post(URL, content=body(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "file_too_large"
    whisperd.finished()


def test_a_length_over_the_cap_is_refused_before_the_body(whisperd: Daemon) -> None:
    """Ten gigabytes are refused by their header alone."""
    with connected(whisperd) as raw:
        raw.sendall(head(10_000_000_000))
        assert raw.recv(65_536).startswith(b"HTTP/1.1 413 ")
    assert ": 0 bytes" in whisperd.finished()


def answer_to(whisperd: Daemon, *sent: bytes) -> bytes:
    """What comes back when no more than this is sent."""
    answer = b""
    with connected(whisperd) as raw:
        for piece in sent:
            raw.sendall(piece)
        while not answer.endswith(b"}}"):
            answer += raw.recv(65_536)
    return answer


def test_a_full_queue_is_refused_before_the_body(whisperd: Daemon) -> None:
    """An upload takes its place with its headers; who finds no place hears it at once, and nothing is asked of him."""
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
    """curl asks first when it sends much, and takes no for an answer."""
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
    """What cannot fit is not even begun, whether the budget says so or the disk."""
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
    """Where the model comes before the file, as most clients send it, the file need not come."""
    model = BOUNDARY + b'Content-Disposition: form-data; name="model"\r\n\r\nnope\r\n'
    found = answer_to(whisperd, head(900_000), model + FILE_PART)
    assert found.startswith(b"HTTP/1.1 404 ")
    assert b'"param":"model"' in found
    whisperd.finished()
    assert not whisperd.service.jobs


def test_a_full_spool(tmp_path: Path) -> None:
    """Uploads share one budget; what does not fit is told to come back."""
    spool = Spool(tmp_path, upload_bytes=1000, budget_bytes=10)
    with daemon(tmp_path, spool=spool) as whisperd, client_of(whisperd.path) as client:
        response = client.post(URL, files=[AUDIO])
        assert (response.status_code, error_of(response)["code"]) == (503, "spool_full")
        assert response.headers["retry-after"] == "5"
        whisperd.finished()


def test_a_spool_that_cannot_be_written(tmp_path: Path) -> None:
    """A missing spool directory is the daemon's trouble and says so."""
    spool = Spool(tmp_path / "gone", upload_bytes=1000, budget_bytes=1000)
    with daemon(tmp_path, spool=spool) as whisperd, client_of(whisperd.path) as client:
        response = client.post(URL, files=[AUDIO])
        assert (response.status_code, error_of(response)["code"]) == (503, "spool_full")
        assert "gone cannot be written (No such file" in error_of(response)["message"]
        whisperd.finished()


def test_nobody_uploads_to_a_daemon_that_is_not_ready(whisperd: Daemon) -> None:
    """The refusal comes before the body, with the reason and the time to wait."""
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


def test_health(client: httpx2.Client, whisperd: Daemon) -> None:
    """A loading daemon lives but is not ready; a draining one says so by its code."""
    routes = ("/livez", "/readyz", "/healthz", "/health")
    assert [client.get(route).json() for route in routes] == [{"status": "ok"}] * 4
    whisperd.service.now = Readiness(ready=False, draining=True)
    assert [client.get(route).status_code for route in routes] == [200, 503, 503, 503]
    assert error_of(client.get("/readyz"))["code"] == "draining"


def test_unknown_routes_and_methods(client: httpx2.Client) -> None:
    """The router's own errors have the same envelope."""
    missing = client.get("/v1/audio/speech")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    slash = client.get("/v1/models/")
    assert (slash.status_code, error_of(slash)["code"]) == (404, "model_not_found")
    wrong = client.get(URL)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert error_of(wrong)["code"] == "method_not_allowed"


def test_an_unexpected_exception(client: httpx2.Client, whisperd: Daemon) -> None:
    """A bug is a 500 with the request's id; what happened is in the log and not in the answer."""
    whisperd.service.error = ValueError("secret detail")
    response = client.post(URL, files=[AUDIO], headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "mine-1" in error_of(response)["message"]
    assert whisperd.log.next() == "mine-1: unexpected error"
    whisperd.finished()


@pytest.mark.parametrize("fields", [{}, {"stream": "true"}])
def test_the_device_is_told(client: httpx2.Client, fields: dict[str, str]) -> None:
    """Each transcript's header says where its model computes; nothing else has that header."""
    response = client.post(URL, files=[AUDIO], data=fields)
    assert response.headers["x-whisperd-device"] == "cpu (fallback)"
    assert "x-whisperd-device" not in client.get("/livez").headers


@pytest.mark.parametrize(("given", "kept"), [("abc 123", True), ("x" * 129, False), ("a\tb", False)])
def test_request_ids(client: httpx2.Client, given: str, kept: bool) -> None:
    """A client's own id is used when it is short and printable, else one is made."""
    found = client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"]
    assert found == given if kept else re.fullmatch("req_[0-9a-f]{32}", found)


def test_the_log_line(client: httpx2.Client, whisperd: Daemon) -> None:
    """One line has everything about a request but its text."""
    response = client.post(URL, files=[AUDIO], data={"model": MODEL}, headers={"x-request-id": "id-7"})
    n_bytes = int(response.request.headers["content-length"])
    line = whisperd.finished()
    pattern = rf"POST {URL} 200 in \d+ ms: {n_bytes} bytes, 4\.5 s of audio, model {MODEL}, id-7"
    assert re.fullmatch(pattern, line)
    assert "Hello" not in line


def test_a_client_that_leaves_cancels_its_job(whisperd: Daemon) -> None:
    """The work of a request ends with its connection, and the audio stays open until then."""
    whisperd.service.waits_last = True
    body = FILE_PART + b"abc\r\n--x--\r\n"
    with connected(whisperd) as raw:
        raw.sendall(head(len(body)) + body)
        assert whisperd.service.started.wait(PATIENCE_S)
    assert whisperd.service.cancelled.wait(PATIENCE_S)
    assert f"POST {URL} 499 " in whisperd.finished()


def test_a_client_that_leaves_its_stream_cancels_its_job(client: httpx2.Client, whisperd: Daemon) -> None:
    """The same holds after the first events."""
    whisperd.service.waits_last = True
    with client.stream("POST", URL, files=[AUDIO], data={"stream": "true"}) as response:
        assert next(response.iter_lines()) == "event: transcript.text.delta"
    assert whisperd.service.cancelled.wait(PATIENCE_S)
    whisperd.finished()


def test_a_client_that_leaves_its_upload(whisperd: Daemon) -> None:
    """Half an upload leaves nothing behind and reaches nobody."""
    with connected(whisperd) as raw:
        raw.sendall(head(10_000) + FILE_PART + b"abc")
    assert f"POST {URL} 499 " in whisperd.finished()
    assert not whisperd.service.jobs


def test_an_upload_that_stands_still(tmp_path: Path) -> None:
    """A client that stops sending gives its place back."""
    with daemon(tmp_path, upload_idle_s=0.05) as whisperd, connected(whisperd) as raw:
        raw.sendall(head(10_000) + FILE_PART + b"abc")
        assert raw.recv(65_536).startswith(b"HTTP/1.1 408 ")
        whisperd.finished()


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_deadline(client: httpx2.Client, whisperd: Daemon, stream: str) -> None:
    """Work that is not done in the time that its request gave it is cancelled."""
    whisperd.service.waits_first = True
    response = client.post(URL, files=[AUDIO], data={"timeout": "0.1", "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    assert "in the 0.1 s that the request gave it" in error_of(response)["message"]
    assert whisperd.service.cancelled.is_set()
    whisperd.finished()


def test_an_upload_that_drips(tmp_path: Path) -> None:
    """A client that always sends a little, but never enough, gives its place back too."""
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


def test_a_client_that_does_not_read(tmp_path: Path) -> None:
    """The work for a client that never reads its stream ends."""
    with daemon(tmp_path, send_idle_s=0.2, keep_alive_s=0.0001) as whisperd:
        whisperd.service.waits_first = True
        body = b"".join(FORM_IN_STREAM)
        with connected(whisperd) as raw:
            raw.sendall(head(len(body)) + body)
            assert whisperd.service.cancelled.wait(PATIENCE_S)
            whisperd.finished()


def test_events_for_whisperd_clients(client: httpx2.Client, whisperd: Daemon) -> None:
    """With the header, segments, progress and the whole transcript come too."""
    response = client.post(URL, files=[AUDIO], data={"stream": "true"}, headers={"x-whisperd-events": "1"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = [json.loads(frame.partition("data: ")[2]) for frame in frames[:-2]]
    assert [event["type"] for event in events] == [
        "transcript.text.delta",
        "whisperd.segment",
        "whisperd.progress",
    ] * 2 + ["whisperd.transcript", "transcript.text.done"]
    assert (events[1]["id"], events[1]["text"]) == (0, " Hello there.")
    assert (events[2]["done_s"], events[2]["total_s"]) == (2.0, 4.5)
    assert events[-2]["x_whisperd"]["windows"]["decoded"] == 1
    assert events[-2]["text"] == events[-1]["text"] == TEXT
    assert "4.5 s of audio" in whisperd.finished()


def test_a_silent_stream_is_kept_alive(tmp_path: Path) -> None:
    """Comments come while there is nothing to tell."""
    with daemon(tmp_path, keep_alive_s=0.02) as whisperd, client_of(whisperd.path) as client:
        whisperd.service.waits_first = True
        with client.stream("POST", URL, files=[AUDIO], data={"stream": "true"}) as response:
            lines = response.iter_lines()
            assert next(lines) == ": keep-alive"
            whisperd.service.release()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        whisperd.finished()


def test_a_stream_for_a_client_with_little_patience(tmp_path: Path) -> None:
    """It hears something before it gives up."""
    with daemon(tmp_path, keep_alive_s=10 * PATIENCE_S) as whisperd, client_of(whisperd.path) as client:
        whisperd.service.waits_first = True
        patience = {"x-stainless-read-timeout": "1.0"}
        with client.stream("POST", URL, files=[AUDIO], data={"stream": "true"}, headers=patience) as response:
            assert next(response.iter_lines()) == ": keep-alive"
            whisperd.service.release()
        whisperd.finished()


def test_a_bug_in_mid_stream_ends_with_an_error(client: httpx2.Client, whisperd: Daemon) -> None:
    """Whatever is raised after the first words, the stream ends with an error in the envelope."""
    whisperd.service.late_error = ValueError("secret detail")
    response = client.post(URL, files=[AUDIO], data={"stream": "true"})
    last = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_work_that_outlives_the_drain(tmp_path: Path) -> None:
    """A request that the stopping daemon has no time for is told to come back, in a stream as well."""
    whole, streamed = FILE_PART + b"abc\r\n--x--\r\n", b"".join(FORM_IN_STREAM)
    with daemon(tmp_path, server=ServerSettings(drain_s=1)) as whisperd:
        whisperd.service.waits_last = True
        with connected(whisperd) as first, connected(whisperd) as second:
            for raw, body in ((first, whole), (second, streamed)):
                whisperd.service.started.clear()
                raw.sendall(head(len(body)) + body)
                assert whisperd.service.started.wait(PATIENCE_S)
            whisperd.stop()
            answers = [rest_of(raw) for raw in (first, second)]
        assert [answer.partition(b"\r\n")[0].split()[1] for answer in answers] == [b"503", b"200"]
        assert b'"code":"draining"' in answers[0]
        assert b'"code": "draining"' in answers[1]
        whisperd.finished()


def received(chunks: Sequence[bytes], spool: Spool) -> Upload:
    messages = iter([*chunks, b""])

    async def receive() -> Any:
        body = next(messages)
        return {"type": "http.request", "body": body, "more_body": bool(body)}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    return asyncio.run(receive_upload(request, spool, Pace(idle_s=PATIENCE_S), lambda _: None))


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(1, 40), max_size=8))
def test_a_form_may_arrive_in_any_pieces(data: bytes, sizes: list[int]) -> None:
    """However a form is cut on its way, and whatever the file holds, the same fields and bytes come out."""
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
    """Fields behind the file count, names with brackets and objects are understood."""
    fields = {"model": "whisper-1", "timestamp_granularities[]": "segment", "chunking_strategy[type]": "server_vad"}
    parts = [(name, (None, value.encode())) for name, value in fields.items()]
    assert client.post(URL, files=[AUDIO, *parts]).json()["text"] == TEXT
    job = whisperd.service.jobs[0]
    assert (job.model, job.chunking.vad_filter) == ("whisper-1", True)


FREE = {"model", "prompt", "keywords", "hotwords"}  # any text is one


@pytest.mark.parametrize("name", sorted(set(FIELDS) - FREE))
def test_an_unknown_value_is_refused_with_its_field(client: httpx2.Client, whisperd: Daemon, name: str) -> None:
    """Whatever the field, a value that it does not have is a 400 that names it as the client has spelled it."""
    for spelled in (name, f"{name}[]"):
        response = client.post(URL, files=[AUDIO], data={spelled: "no such value"})
        assert response.status_code == 400, spelled
        assert error_of(response)["param"] == spelled
    assert not whisperd.service.jobs


ARRAYS = {
    "timestamp_granularities": ("word", "segment"),
    "include": ("logprobs",),
    "languages": ("de", "fr"),
    "keywords": ("PBX", "Zoë"),
}


def test_arrays_in_both_spellings_and_parts_in_both_orders(client: httpx2.Client, whisperd: Daemon) -> None:
    """Python sends the file last, Node first, curl users leave out the brackets: the same job comes of all of them."""
    assert set(ARRAYS) == {name for name, field in FIELDS.items() if field.array}
    for name, values in ARRAYS.items():
        response_format = "json" if name == "include" else "verbose_json"
        found = []
        for spelled in (name, f"{name}[]"):
            fields = [(spelled, (None, value.encode())) for value in values]
            fields.append(("response_format", (None, response_format.encode())))
            for parts in ([AUDIO, *fields], [*fields, AUDIO]):
                assert client.post(URL, files=parts).status_code == 200
                job = whisperd.service.jobs[-1]
                found.append((job.options, job.chunking, job.model, whisperd.service.audio[-1]))
        assert found == found[:1] * 4
        assert found[0][0] != Options(), name


def test_reload(client: httpx2.Client, whisperd: Daemon) -> None:
    """The daemon's own user may reload; a configuration with mistakes is refused in its own words."""
    assert client.post("/v1/whisperd/reload").json() == {"changed": []}
    whisperd.service.reload_error = ConfigError(Problem(where="whisperd.toml", key="models", message="is empty"))
    response = client.post("/v1/whisperd/reload")
    assert (response.status_code, error_of(response)["code"]) == (500, "config_error")
    assert error_of(response)["message"] == "whisperd.toml: models: is empty"


def test_an_order_without_end(client: httpx2.Client, whisperd: Daemon) -> None:
    """The body of a reconcile order is bounded, with and without a length; what is too long is not kept."""

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65_536

    for content in (b" " * 65_537, endless()):
        response = client.post("/v1/whisperd/reconcile", content=content)
        assert (response.status_code, error_of(response)["code"]) == (413, "order_too_long")
    assert not whisperd.service.orders
    assert client.post("/v1/whisperd/reconcile", content=b'{"check": true}' + b" " * 65_000).status_code == 200


def test_status(client: httpx2.Client) -> None:
    """Status is the service's own JSON."""
    assert client.get("/v1/whisperd/status").json() == {"models": [MODEL], "queued": 0}


@pytest.mark.parametrize("peer", [(1, os.geteuid() + 12_345, 1), None])
def test_strangers_may_not_reload(tmp_path: Path, peer: tuple[int, int, int] | None) -> None:
    """Another user, or one that the kernel does not name, is refused."""
    app = create_app(FakeService(), ApiSettings(), Spool(tmp_path, upload_bytes=1000, budget_bytes=1000))

    async def disguised(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["peer"] = peer
        await app(scope, receive, send)

    path = tmp_path / "stranger.sock"
    with serving(disguised, path), client_of(path) as client:
        response = client.post("/v1/whisperd/reload", headers={"host": "localhost"})
        assert (response.status_code, error_of(response)["code"]) == (403, "peer_not_allowed")
        assert error_of(response)["type"] == "permission_error"


def parse(*form: tuple[str, str], defaults: Options | None = None) -> Options:
    return parse_fields(form, "transcribe", defaults or Options()).options


def test_temperature_zero_is_the_ladder() -> None:
    """0 keeps the configured ladder, anything above is the only temperature."""
    assert parse(("temperature", "0")).temperatures == TEMPERATURES
    assert parse(("temperature", "0.4")).temperatures == (0.4,)
    assert parse(("temperature", "0.0"), defaults=Options(temperatures=(0.0, 0.5))).temperatures == (0.0, 0.5)


def test_languages() -> None:
    """Codes and names are accepted; auto means detection, nothing means the configuration."""
    german = Options(language="de")
    assert parse(("language", "French")).language == "fr"
    assert parse(("language", "auto"), defaults=german).language is None
    assert parse(("language", ""), defaults=german).language == "de"


def test_three_spellings_of_chunking() -> None:
    """A word, a JSON object and one field for each member mean the same."""
    wanted = Chunking(vad_filter=True, threshold=0.4, padding_ms=100, silence_ms=300)
    members = {"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 100, "silence_duration_ms": 300}
    spelled = [(f"chunking_strategy[{name}]", str(value)) for name, value in members.items()]
    for form in (spelled, list(reversed(spelled)), [("chunking_strategy", json.dumps(members))]):
        assert parse_fields(form, "transcribe", Options()).chunking == wanted
    assert parse_fields([("chunking_strategy", "auto")], "transcribe", Options()).chunking == Chunking(vad_filter=True)
    off = [("chunking_strategy", "auto"), ("vad_filter", "false")]
    assert parse_fields(off, "transcribe", Options()).chunking == Chunking(vad_filter=False)


def test_hints() -> None:
    """Keywords and hotwords are one list, several languages restrict the detection, a single one replaces it."""
    options = parse(("keywords[]", "PBX"), ("keywords[]", "Zoë"), ("hotwords", "Asterisk, Digium"))
    assert options.hotwords == ("Asterisk", "Digium", "PBX", "Zoë")
    assert parse(("keywords", "PBX")).hotwords == ("PBX",)
    several = parse(("languages[]", "de"), ("languages[]", "French"))
    assert (several.language, several.languages) == (None, ("de", "fr"))
    single = parse(("languages", "de"))
    assert (single.language, single.languages) == ("de", ())


def test_thresholds_can_be_switched_off() -> None:
    """'none' switches a safeguard off, a number sets it."""
    options = parse(("no_speech_threshold", "none"), ("log_prob_threshold", "-0.5"))
    assert (options.no_speech_threshold, options.log_prob_threshold) == (None, -0.5)


def test_every_field_takes_an_empty_value() -> None:
    """Clients that send all their fields, most of them empty, get the defaults."""
    found = parse_fields([(name, "") for name in FIELDS], "translate", Options())
    assert found.options == Options(task="translate")
    assert (found.model, found.chunking, found.stream, found.response_format) == (None, Chunking(), False, "json")


def test_long_values_are_cut_in_messages() -> None:
    """A client's own words come back shortened."""
    with pytest.raises(RequestError) as caught:
        parse(("x" * 60_000, "1"))
    assert len(str(caught.value)) < 500
    with pytest.raises(UnsupportedParameter, match="it is called 'prompt' here"):
        parse(("initial_prompt", "x"))


def test_the_fake_is_what_the_tests_expect() -> None:
    """The transcript behind all these answers has the text that they compare with."""
    assert TRANSCRIPT.text == TEXT
