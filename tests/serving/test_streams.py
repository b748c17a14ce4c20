"""Work whose results are sent while it runs, and that is cancelled when its client disconnects."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest

from tests.support.api import AUDIO, BOUNDARY, FILE_PART, URL, client_of, connected, error_of, head, rest_of
from tests.support.service_fake import PATIENCE_S, TEXT, Daemon, daemon
from whisperd.serving.interface import ServerSettings

FORM_IN_STREAM = (
    FILE_PART + b"abc\r\n",
    BOUNDARY + b'Content-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n--x--\r\n',
)


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
    """The work is cancelled after the first events too."""
    whisperd.service.waits_last = True
    with client.stream("POST", URL, files=[AUDIO], data={"stream": "true"}) as response:
        assert next(response.iter_lines()) == "event: transcript.text.delta"
    assert whisperd.service.cancelled.wait(PATIENCE_S)
    whisperd.finished()


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_deadline(client: httpx2.Client, whisperd: Daemon, stream: str) -> None:
    """Work that exceeds the deadline of its request is cancelled."""
    whisperd.service.waits_first = True
    response = client.post(URL, files=[AUDIO], data={"timeout": "0.1", "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    assert "in the 0.1 s that the request gave it" in error_of(response)["message"]
    assert whisperd.service.cancelled.is_set()
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
    """With the header, segments, progress and the whole transcript are sent too."""
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
    """Comments are sent while there is no event."""
    with daemon(tmp_path, keep_alive_s=0.02) as whisperd, client_of(whisperd.path) as client:
        whisperd.service.waits_first = True
        with client.stream("POST", URL, files=[AUDIO], data={"stream": "true"}) as response:
            lines = response.iter_lines()
            assert next(lines) == ": keep-alive"
            whisperd.service.release()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        whisperd.finished()


def test_a_stream_for_a_client_with_a_short_timeout(tmp_path: Path) -> None:
    """A client with a short timeout gets something before it expires."""
    with daemon(tmp_path, keep_alive_s=10 * PATIENCE_S) as whisperd, client_of(whisperd.path) as client:
        whisperd.service.waits_first = True
        patience = {"x-stainless-read-timeout": "1.0"}
        with client.stream("POST", URL, files=[AUDIO], data={"stream": "true"}, headers=patience) as response:
            assert next(response.iter_lines()) == ": keep-alive"
            whisperd.service.release()
        whisperd.finished()


def test_a_bug_in_mid_stream_ends_with_an_error(client: httpx2.Client, whisperd: Daemon) -> None:
    """An exception after the first words ends the stream with an error in the envelope."""
    whisperd.service.late_error = ValueError("secret detail")
    response = client.post(URL, files=[AUDIO], data={"stream": "true"})
    last = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_work_that_outlives_the_drain(tmp_path: Path) -> None:
    """A request that exceeds the drain's time gets an error that allows a retry, in a stream as well."""
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
