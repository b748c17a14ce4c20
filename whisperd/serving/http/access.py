"""Access: Host, Origin and key over TCP, the peer over a Unix socket, whose file mode decides who may connect.

A web page can send a form to any address on loopback, and by DNS rebinding read the answer too: so Host and Origin must
be names of this listener, and a key, where there is one, must come with each request.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from whisperd.errors import HostNotAllowed, InvalidApiKey, PeerNotAllowed
from whisperd.serving.interface import Peer

LOOPBACK_NAMES = frozenset({"127.0.0.1", "::1", "localhost"})
SCHEME = "bearer"
HEALTH = frozenset({"/livez", "/readyz", "/healthz", "/health"})  # monitors of a machine have no key


class Guard:
    """Passes on requests from a Unix socket, and those over TCP that have the right Host, Origin and key.

    Args:
        app: the application.
        hosts: names besides those of loopback that Host and Origin may have.
        key: clients must send it as a bearer token, except to the health routes; None asks for none.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], key: str | None) -> None:
        self._app = app
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in hosts}
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; raises HostNotAllowed or InvalidApiKey."""
        if scope["type"] == "http" and scope["state"].get("peer") is None:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(headers)
            if scope["path"] not in HEALTH:
                self._check_key(headers)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if _host_of("//" + headers.get("host", "")) not in self._hosts:
            raise HostNotAllowed(
                f"the Host header names {headers.get('host', '')[:80]!r}, which is no name of this daemon; "
                "server.tcp_hosts can add it",
                param="host",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        foreign = origin is not None and _host_of(origin) not in self._hosts
        if foreign or headers.get("sec-fetch-site") == "cross-site":
            raise HostNotAllowed("web pages of other origins may not use this daemon", param="origin")

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != SCHEME or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            raise InvalidApiKey("send the daemon's key as a bearer token (server.tcp_key_file)")


def refuse_stranger(request: Request) -> None:
    """Raises PeerNotAllowed unless the peer is root or the daemon's user; over TCP the peer is not known."""
    found = request.scope["state"].get("peer")
    if found is None:
        raise PeerNotAllowed("this needs a connection over the Unix socket, where the kernel names the peer")
    peer = Peer(*found)
    allowed = (0, os.geteuid())
    if peer.uid not in allowed:
        raise PeerNotAllowed(f"uid {peer.uid} (process {peer.pid}) may not do this; try it as root or uid {allowed[1]}")


def _host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
