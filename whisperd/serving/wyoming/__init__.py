"""The Wyoming protocol, by which Home Assistant has speech transcribed. Home of the package wyoming (an extra)."""

from __future__ import annotations

from whisperd.serving.wyoming.listener import Listener
from whisperd.serving.wyoming.presence import require
from whisperd.serving.wyoming.session import Settings

__all__ = ["Listener", "Settings", "require"]
