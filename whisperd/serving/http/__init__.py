"""The HTTP interface: OpenAI's audio routes, health, status. Home of starlette and python-multipart."""

from __future__ import annotations

from whisperd.serving.http.app import create_app
from whisperd.serving.interface import (
    ApiSettings,
    Chunking,
    Job,
    ModelCard,
    Peer,
    Readiness,
    ReconcileOrder,
    Seat,
    Service,
    Tell,
)

__all__ = [
    "ApiSettings",
    "Chunking",
    "Job",
    "ModelCard",
    "Peer",
    "Readiness",
    "ReconcileOrder",
    "Seat",
    "Service",
    "Tell",
    "create_app",
]
