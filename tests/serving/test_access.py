"""Routes without audio, their permissions, and what every answer has."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.api import AUDIO, URL, client_of, error_of
from tests.support.service_fake import MODEL, STATUS, TEXT, TRANSCRIPT, Daemon, FakeService, serving
from whisperd.errors import ConfigError, Problem
from whisperd.serving.http import create_app
from whisperd.serving.interface import ApiSettings, Readiness
from whisperd.serving.spool import Spool


def test_health(client: httpx2.Client, whisperd: Daemon) -> None:
    """A loading daemon is alive but not ready; a draining one answers with its own code."""
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
    """A bug is a 500 with the request's id; the details are in the log and not in the answer."""
    whisperd.service.error = ValueError("secret detail")
    response = client.post(URL, files=[AUDIO], headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "mine-1" in error_of(response)["message"]
    assert whisperd.log.next() == "mine-1: unexpected error"
    whisperd.finished()


@pytest.mark.parametrize("fields", [{}, {"stream": "true"}])
def test_the_header_names_the_device(client: httpx2.Client, fields: dict[str, str]) -> None:
    """Each transcript's header names the device of its model; no other answer has that header."""
    response = client.post(URL, files=[AUDIO], data=fields)
    assert response.headers["x-whisperd-device"] == "cpu (fallback)"
    assert "x-whisperd-device" not in client.get("/livez").headers


@pytest.mark.parametrize(("given", "kept"), [("abc 123", True), ("x" * 129, False), ("a\tb", False)])
def test_request_ids(client: httpx2.Client, given: str, kept: bool) -> None:
    """A client's own id is used when it is short and printable, else one is made."""
    found = client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"]
    assert found == given if kept else re.fullmatch("req_[0-9a-f]{32}", found)


def test_the_log_line(client: httpx2.Client, whisperd: Daemon) -> None:
    """One line has everything about a request except its text."""
    response = client.post(URL, files=[AUDIO], data={"model": MODEL}, headers={"x-request-id": "id-7"})
    n_bytes = int(response.request.headers["content-length"])
    line = whisperd.finished()
    pattern = rf"POST {URL} 200 in \d+ ms: {n_bytes} bytes, 4\.5 s of audio, model {MODEL}, id-7"
    assert re.fullmatch(pattern, line)
    assert "Hello" not in line


def test_reload(client: httpx2.Client, whisperd: Daemon) -> None:
    """The daemon's own user may reload; a configuration with mistakes is refused with their list."""
    assert client.post("/v1/whisperd/reload").json()["changed"] == []
    whisperd.service.reload_error = ConfigError(Problem(where="whisperd.toml", key="models", message="is empty"))
    response = client.post("/v1/whisperd/reload")
    assert (response.status_code, error_of(response)["code"]) == (500, "config_error")
    assert error_of(response)["message"] == "whisperd.toml: models: is empty"


def test_an_endless_reconcile_request(client: httpx2.Client, whisperd: Daemon) -> None:
    """The body of a reconcile request is limited, with and without a length; a longer one is not kept."""

    pieces = iter([b" " * 65_536] * 4)
    for content in (b" " * 65_537, pieces):
        response = client.post("/v1/whisperd/reconcile", content=content)
        assert (response.status_code, error_of(response)["code"]) == (413, "order_too_long")
    assert not whisperd.service.orders
    assert client.post("/v1/whisperd/reconcile", content=b'{"check": true}' + b" " * 65_000).status_code == 200


def test_status(client: httpx2.Client) -> None:
    """Status is the service's own JSON."""
    assert client.get("/v1/whisperd/status").json() == STATUS


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


def test_the_fake_is_what_the_tests_expect() -> None:
    """The transcript behind all these answers has the text that they compare with."""
    assert TRANSCRIPT.text == TEXT
