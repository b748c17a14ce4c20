"""Over TCP a request needs the right name, no foreign web page as its origin, and the key."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from pydantic import ValidationError

from tests.support.service_fake import PATIENCE_S, FakeService
from whisperd.config.options import ServerTable
from whisperd.errors import ConfigError
from whisperd.serving.http import create_app
from whisperd.serving.http.server import Server
from whisperd.serving.interface import ApiSettings
from whisperd.serving.sockets import bind_tcp, split_address
from whisperd.serving.spool import Spool


@contextmanager
def listening(directory: Path, *, key: str | None = None, hosts: tuple[str, ...] = ()) -> Iterator[httpx2.Client]:
    """The application on a loopback port of its own."""
    settings = ApiSettings(tcp_key=key, tcp_hosts=hosts)
    listener, server = bind_tcp("127.0.0.1:0"), Server()
    app = create_app(FakeService(), settings, Spool(directory, upload_bytes=1000, budget_bytes=1000))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(app, [listener])))
    thread.start()
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=PATIENCE_S) as client:
            yield client
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(PATIENCE_S)
        loop.close()


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 200, ""),
        ({"host": "localhost:1234"}, 200, ""),
        ({"host": "[::1]"}, 200, ""),
        ({"host": "Talk.example"}, 200, ""),
        ({"host": "evil.example"}, 403, "host_not_allowed"),
        ({"host": "127.0.0.1.evil.example"}, 403, "host_not_allowed"),
        ({"host": "["}, 403, "host_not_allowed"),
        ({"origin": "http://localhost:8080"}, 200, ""),
        ({"origin": "https://evil.example"}, 403, "host_not_allowed"),
        ({"origin": "null"}, 403, "host_not_allowed"),
        ({"sec-fetch-site": "cross-site"}, 403, "host_not_allowed"),
        ({"sec-fetch-site": "same-origin"}, 200, ""),
    ],
)
def test_names(tmp_path: Path, headers: Mapping[str, str], status: int, code: str) -> None:
    """DNS rebinding and forms of foreign pages get 403."""
    with listening(tmp_path, hosts=("talk.example",)) as client:
        response = client.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert not code or response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic secret", 401), ("secret", 401), ("Bearer secret", 200),
     ("bearer  secret", 200), ("Bearer s\u00e9cret", 401)],
)  # fmt: skip
def test_key(tmp_path: Path, authorization: str | None, status: int) -> None:
    """With a key every route but the health checks needs it, and a refusal says how to authenticate."""
    headers = {} if authorization is None else {b"authorization": authorization.encode("latin-1")}
    with listening(tmp_path, key="secret") as client:
        for route in ("/v1/models", "/metrics", "/v1/whisperd/status", "/openapi.json", "/livez/", "/v1/no/route"):
            response = client.get(route, headers=headers)
            assert response.status_code == 401 if status == 401 else response.status_code in {200, 404}
            challenge = response.headers.get("www-authenticate")
            assert challenge == ('Bearer realm="whisperd"' if status == 401 else None)
        for route in ("/livez", "/readyz", "/healthz", "/health"):
            assert client.get(route, headers=headers).status_code == 200
        assert client.get("/livez", headers={"host": "evil.example"}).status_code == 403


def test_no_reload_over_tcp(tmp_path: Path) -> None:
    """The kernel does not identify the peer over TCP, so admin calls are refused."""
    with listening(tmp_path) as client:
        response = client.post("/v1/whisperd/reload")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "peer_not_allowed")


def test_addresses() -> None:
    """Both families are accepted; names and nonsense are refused with an example."""
    assert split_address("127.0.0.1:9000") == ("127.0.0.1", 9000)
    assert split_address("[::1]:9000") == ("::1", 9000)
    for wrong in ("9000", ":9000", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x"):
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9000"):
            split_address(wrong)
    with pytest.raises(ConfigError, match="cannot listen"):
        bind_tcp("no.such.name:80")
    with bind_tcp("127.0.0.1:0") as taken, pytest.raises(ConfigError, match="in use"):
        bind_tcp(f"127.0.0.1:{taken.getsockname()[1]}")
    assert isinstance(taken, socket.socket)


def test_the_world_needs_a_key() -> None:
    """An address that others can reach is refused without a key."""
    with pytest.raises(ValidationError, match="set tcp_key_file"):
        ServerTable(tcp="0.0.0.0:9000")
    with pytest.raises(ValidationError, match="expects an address and a port"):
        ServerTable(tcp="localhost:9000")
    assert ServerTable(tcp="0.0.0.0:9000", tcp_key_file="/etc/whisperd.key").tcp
    assert ServerTable(tcp="127.0.0.1:9000").tcp
