"""``python standard_library.py FILE``: prints the transcript of a file; needs no package."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import uuid
from pathlib import Path

SOCKET = os.environ.get("WHISPERD_SOCKET", "/run/whisperd.sock")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def connect(self) -> None:
        """Connects to the daemon."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(SOCKET)


def form(path: Path, **fields: str) -> tuple[bytes, str]:
    """The body of a form with fields and a file, and its content type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
    body = b"".join([*parts, head.encode(), path.read_bytes(), f"\r\n--{boundary}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={boundary}"


def transcribe(path: Path, **fields: str) -> dict[str, object]:
    """The answer of the daemon, as JSON."""
    body, content_type = form(path, **fields)
    connection = UnixConnection("whisperd")
    connection.request("POST", "/v1/audio/transcriptions", body, {"Content-Type": content_type})
    response = connection.getresponse()
    answer: dict[str, object] = json.loads(response.read())
    if response.status != http.HTTPStatus.OK:
        raise SystemExit(f"{response.status}: {answer['error']}")
    return answer


if __name__ == "__main__":
    sys.stdout.write(f"{transcribe(Path(sys.argv[1]), response_format='json')['text']}\n")
