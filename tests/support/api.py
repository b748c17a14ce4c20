"""Raw requests, as no well-behaved client sends them, and the parts of a form."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.support.service_fake import PATIENCE_S, Daemon

URL = "/v1/audio/transcriptions"
AUDIO = ("file", ("talk.flac", b"fLaC and so on"))
BOUNDARY = b"--x\r\n"
FILE_PART = BOUNDARY + b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


@contextmanager
def client_of(path: Path) -> Iterator[httpx2.Client]:
    transport = httpx2.HTTPTransport(uds=str(path))
    with httpx2.Client(transport=transport, base_url="http://whisperd", timeout=PATIENCE_S) as client:
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
