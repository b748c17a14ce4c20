"""The HTTP interface: OpenAI's audio routes, health, status. Home of starlette and python-multipart."""

from __future__ import annotations

from whisperd.serving.http.app import create_app

__all__ = ["create_app"]
