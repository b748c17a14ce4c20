"""The Wyoming protocol, by which Home Assistant has speech transcribed. Home of the package wyoming (an extra)."""

from __future__ import annotations

from importlib.util import find_spec

from whisperd.errors import ConfigError, Problem
from whisperd.serving.wyoming.listener import Listener
from whisperd.serving.wyoming.session import Settings

__all__ = ["Listener", "Settings", "require"]


def require() -> None:
    """Raises ConfigError when the package wyoming is not installed; called before anything listens."""
    if find_spec("wyoming") is None:
        raise ConfigError(
            Problem(
                where="",
                key="server.wyoming",
                message="needs the package wyoming; try: pip install 'whisperd[wyoming]' "
                "(the Debian package: whisperd-add-extra wyoming), or leave the option and its socket unit out",
            )
        )
