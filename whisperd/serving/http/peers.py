"""Who is at the other end of the Unix socket, and what that process may do."""

from __future__ import annotations

import os

from starlette.requests import Request

from whisperd.errors import PeerNotAllowed
from whisperd.serving.interface import Peer


def refuse_stranger(request: Request) -> None:
    """Raises PeerNotAllowed unless the peer is root or the daemon's user. Who cannot be known is a stranger."""
    found = request.scope["state"].get("peer")
    if found is None:
        raise PeerNotAllowed("this needs a connection over the Unix socket, where the kernel names the peer")
    peer = Peer(*found)
    allowed = (0, os.geteuid())
    if peer.uid not in allowed:
        raise PeerNotAllowed(f"uid {peer.uid} (process {peer.pid}) may not do this; try it as root or uid {allowed[1]}")
