"""Whether the package wyoming is there; asked before anything listens."""

from __future__ import annotations

from importlib.util import find_spec

from whisperd.errors import ConfigError, Problem


def require() -> None:
    """Raises ConfigError when it is not."""
    if find_spec("wyoming") is None:
        raise ConfigError(
            Problem(
                where="",
                key="server.wyoming",
                message="needs the package wyoming; try: pip install 'whisperd[wyoming]' "
                "(the Debian package: whisperd-add-extra wyoming), or leave the option and its socket unit out",
            )
        )
