"""A Hugging Face Hub on the loopback interface, with faults on demand; the real huggingface_hub client accepts it.

Two hosts: the Hub and its CDN, since the client drops its token there and reads metadata only on the way. Large files
("LFS") are redirected to the CDN, small ones ("git") come from the Hub itself, as at huggingface.co.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".safetensors")
CHUNK_BYTES = 65536
HUB_HOST, CDN_HOST = "127.0.0.1", "127.0.0.2"
BAD_TOKEN = "hf_bad"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own hash


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository."""

    path: str
    data: bytes

    @property
    def is_lfs(self) -> bool:
        return self.path.endswith(LFS_SUFFIXES)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        return git_sha1(self.pointer if self.is_lfs else self.data)

    def lfs(self, digest_key: str) -> dict[str, Any]:
        if not self.is_lfs:
            return {}
        return {"lfs": {digest_key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}}


@dataclass(slots=True, kw_only=True)
class HubRepo:
    """A repository; ``tokens`` may read it when it is private or gated."""

    id: str
    private: bool = False
    gated: bool = False
    tokens: frozenset[str] = frozenset()
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Adds a commit with exactly these files and moves the branch to it."""
        tree = {path: HubFile(path=path, data=data) for path, data in files.items()}
        text = f"{self.id} {len(self.commits)} " + " ".join(file.oid for file in tree.values())
        commit = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324 - a name
        self.commits[commit] = tree
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass(slots=True, kw_only=True)
class Fault:
    """A fault of requests whose ``METHOD /path`` matches.

    Args:
        match: a regular expression.
        times: number of requests that get it; None means all.
        status: answered instead, with ``headers`` and ``body``.
        close: the connection ends without an answer.
        reset: the connection is torn down (RST) where ``cut_at`` says, else in place of an answer.
        silent: the request is taken, and no answer ever comes.
        corrupt: wrong bytes, as many as there should be.
        replace: another body, with its own length.
        more_bytes: Content-Length is larger than the body by so many bytes.
        cut_at: the connection ends after so many bytes.
        stall_at: nothing comes after so many bytes.
        rate_bytes_per_s: how fast the body comes.
        ignore_range: the whole body, whatever part was asked for.
        endless: an answer of the API whose body never ends.
    """

    match: str
    times: int | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"the Hub is not well"
    close: bool = False
    reset: bool = False
    silent: bool = False
    corrupt: bool = False
    replace: bytes | None = None
    more_bytes: int = 0
    cut_at: int | None = None
    stall_at: int | None = None
    rate_bytes_per_s: float | None = None
    ignore_range: bool = False
    endless: bool = False

    def takes(self, line: str) -> bool:
        if not re.search(self.match, line) or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class LoopbackHub:
    """The Hub: repositories, faults, and a log of requests as ``METHOD /path``.

    ``sent_bytes`` counts what has left as bodies of files. ``nowhere`` is an address that never answers.
    ``resolve_cache`` redirects small files inside the Hub, as huggingface.co does; ``xet_port`` says that large files
    are at a xet store on that port.
    """

    def __init__(self) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens_seen: set[str] = set()
        self.sent_bytes = 0
        self.nowhere = ""
        self.resolve_cache = False
        self.xet_port: int | None = None
        self.closing = threading.Event()
        self.stalled = threading.Event()
        self.lock = threading.Lock()
        self.hub, self.cdn = _Server(self, HUB_HOST), _Server(self, CDN_HOST)

    @property
    def endpoint(self) -> str:
        return f"http://{HUB_HOST}:{self.hub.server_port}"

    def add(self, repo_id: str, files: Mapping[str, bytes], **options: Any) -> HubRepo:
        """Adds a repository with one commit on main."""
        repo = self.repos[repo_id] = HubRepo(id=repo_id, **options)
        repo.commit(files)
        return repo

    def fault(self, match: str, **what: Any) -> Fault:
        self.faults.append(Fault(match=match, **what))
        return self.faults[-1]

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            self.requests.append(line)
            return next((fault for fault in self.faults if fault.takes(line)), None)

    def count(self, n_bytes: int) -> None:
        with self.lock:
            self.sent_bytes += n_bytes

    def blob(self, sha256: str) -> HubFile | None:
        files = (file for repo in self.repos.values() for tree in repo.commits.values() for file in tree.values())
        return next((file for file in files if file.sha256 == sha256), None)


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that neither accepts nor refuses a connection: the socket's queue is full, and SYNs are dropped."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def serving() -> Iterator[LoopbackHub]:
    """Runs a Hub until the end of the block."""
    hub = LoopbackHub()
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in (hub.hub, hub.cdn)]
    for thread in threads:
        thread.start()
    try:
        with black_hole() as hub.nowhere:
            yield hub
    finally:
        hub.closing.set()
        for server, thread in zip((hub.hub, hub.cdn), threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, app: LoopbackHub, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.app = app

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that close their connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    fault: Fault | None = None

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: ``LoopbackHub.requests`` is the log."""

    def do_GET(self) -> None:
        self.fault = fault = self.server.app.take_fault(f"{self.command} {self.path}")
        if self.token:
            self.server.app.tokens_seen.add(self.token)
        if fault and fault.silent:
            self._fall_silent()
            self._hang_up()
        elif fault and (fault.close or (fault.reset and fault.cut_at is None)):
            self._hang_up()
        elif fault and fault.endless:
            self._send_for_ever(fault)
        elif fault and fault.status:
            self._send(fault.status, fault.body, fault.headers)
        else:
            self._route()

    do_HEAD = do_GET

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") if header.startswith("Bearer ") else None

    def _route(self) -> None:
        url = urlsplit(self.path)
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", url.path):
            file = self.server.app.blob(found[1])
            self._body(file.data, {}) if file else self._send(404)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", url.path):
            self._api(found[1], found[2], unquote(found[3]), with_sizes="blobs" in parse_qs(url.query))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-read-token/(.+)", url.path):
            self._xet_token()
        elif found := re.fullmatch(r"(?:/api/resolve-cache/models)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self._send(404)

    def _found(self, repo_id: str, revision: str) -> tuple[HubRepo, str] | None:
        """The repository and commit, or an answer with the reason, in the words of the real Hub."""
        repo = self.server.app.repos.get(repo_id)
        if self.token == BAD_TOKEN:
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and self.token not in repo.tokens):
            self._refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and self.token not in repo.tokens:
            self._refuse(403 if self.token else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif (commit := repo.resolve(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def _api(self, repo_id: str, kind: str, revision: str, *, with_sizes: bool) -> None:
        found = self._found(repo_id, revision)
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit].values()
        if kind == "tree":
            tree = [
                {"type": "file", "oid": file.oid, "size": len(file.data), "path": file.path, **file.lfs("oid")}
                for file in files
            ]
            self._json(tree)
            return
        siblings: list[dict[str, Any]] = [{"rfilename": file.path} for file in files]
        if with_sizes:
            siblings = [
                {"rfilename": file.path, "blobId": file.oid, "size": len(file.data), **file.lfs("sha256")}
                for file in files
            ]
        self._json({"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._found(repo_id, revision)
        if found is None:
            return
        repo, commit = found
        file = repo.commits[commit].get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            location = f"http://{CDN_HOST}:{self.server.app.cdn.server_port}/cdn/{file.sha256}"
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), "Location": location}
            self._send(302, b"", headers | linked | self._xet(repo_id, file))
        elif self.server.app.resolve_cache and not self.path.startswith("/api/"):
            self._send(307, b"", headers | {"Location": f"/api/resolve-cache/models{self.path}"})
        else:
            self._body(file.data, headers)

    def _xet(self, repo_id: str, file: HubFile) -> dict[str, str]:
        if self.server.app.xet_port is None:
            return {}
        route = f"{self.server.app.endpoint}/api/models/{repo_id}/xet-read-token/main"
        return {"X-Xet-Hash": file.sha256, "Link": f'<{route}>; rel="xet-auth"'}

    def _xet_token(self) -> None:
        address = f"http://127.0.0.1:{self.server.app.xet_port}"
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "a-token", "X-Xet-Token-Expiration": "9999999999"}
        self._send(200, b"{}", headers)

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self, data: bytes, headers: Mapping[str, str]) -> None:
        fault = self.fault or Fault(match="")
        if fault.corrupt:
            data = bytes(byte ^ 0xFF for byte in data[:16]) + data[16:]
        data = data if fault.replace is None else fault.replace
        start = 0
        if not fault.ignore_range and (found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(found[1])
        if start >= len(data) > 0:
            self._send(416)
            return
        self.send_response(206 if start else 200)
        extra = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        for name, value in {"Content-Length": str(len(data) - start + fault.more_bytes), **extra, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._stream(data[start:], fault)

    def _stream(self, data: bytes, fault: Fault) -> None:
        stop_at = next((at for at in (fault.cut_at, fault.stall_at) if at is not None), len(data))
        started_s = time.monotonic()
        for at in range(0, min(stop_at, len(data)), CHUNK_BYTES):
            sent = self.wfile.write(data[at : min(at + CHUNK_BYTES, stop_at)])
            self.server.app.count(sent)
            if fault.rate_bytes_per_s:
                time.sleep(max(0.0, started_s + at / fault.rate_bytes_per_s - time.monotonic()))
        if fault.stall_at is not None:
            self._fall_silent()
        if stop_at < len(data) or fault.more_bytes:
            self._hang_up()

    def _send_for_ever(self, fault: Fault) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        piece = b" " if fault.rate_bytes_per_s else bytes(CHUNK_BYTES)
        while not self.server.app.closing.wait(1 / fault.rate_bytes_per_s if fault.rate_bytes_per_s else 0):
            self.server.app.count(self.wfile.write(piece))

    def _fall_silent(self) -> None:
        self.wfile.flush()
        self.server.app.stalled.set()
        self.server.app.closing.wait(60)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        if self.fault and self.fault.reset:  # closing at once with no time to linger is an RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


def whisper_files(seed: int = 0, *, size_bytes: int = 300_000) -> dict[str, bytes]:
    """The files of a CTranslate2 repository, with arbitrary bytes for weights."""
    weights = hashlib.shake_128(str(seed).encode()).digest(size_bytes)
    return {
        ".gitattributes": b"*.bin filter=lfs\n",
        "README.md": b"# a model\n",
        "config.json": json.dumps({"seed": seed}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "vocabulary.txt": b"\n".join(b"token%d" % number for number in range(100)),
        "model.bin": weights,
    }
