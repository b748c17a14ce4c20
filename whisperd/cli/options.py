"""Options that several commands share, and what follows from them: the configuration, the client, messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from whisperd.errors import Error

if TYPE_CHECKING:
    from whisperd.client import Client
    from whisperd.config import Loaded

Command = TypeVar("Command", bound=Callable[..., Any])


# Command and its former option -> the option that took its place; the former one is read, with a warning.
RENAMED: Mapping[tuple[str, str], str] = MappingProxyType({("transcribe", "-o"): "-d"})


def config_options(command: Command) -> Command:
    """Adds ``-c`` and ``-o``, which mean the same in every command."""
    command = click.option(
        "-o", "--option", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one option; repeatable."
    )(command)
    return click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file.")(
        command
    )


def warn_of_renamed(command: str, former: str, value: str) -> None:
    """Says on stderr that an option has another name now."""
    new = RENAMED[command, former]
    click.echo(f"warning: {command} {former} {value} is now {new} {value}; {former} sets an option", err=True)


def socket_option(command: Command) -> Command:
    """Adds ``--socket``, for commands that talk to the daemon."""
    # readable=False: the client explains a missing permission
    path = click.Path(path_type=Path, readable=False)
    return click.option("--socket", "socket_file", type=path, help="Socket of the daemon.")(command)


def read_config(config_file: Path | None, overrides: Sequence[str]) -> Loaded:
    """Reads the configuration in effect; raises ConfigError."""
    from whisperd.config import load

    return load(config_file, overrides, environ=os.environ, cwd=Path.cwd())


def read_checked_config(config_file: Path | None, overrides: Sequence[str]) -> Loaded:
    """Reads the configuration in effect and checks it on this machine; raises ConfigError."""
    from whisperd.config import check

    return check(read_config(config_file, overrides), os.environ)


def client(socket_file: Path | None, config_file: Path | None, overrides: Sequence[str], timeout_s: float) -> Client:
    """Makes a client of the daemon that the options name."""
    from whisperd.client import Client

    return Client(socket_file or daemon_socket(config_file, overrides), timeout_s)


def daemon_socket(config_file: Path | None, overrides: Sequence[str]) -> Path:
    """The socket of this user's daemon, or of the system's where this user runs none."""
    from whisperd.config import socket_path

    config = read_config(config_file, overrides).config
    own = socket_path(config, os.environ, uid=os.getuid())
    if own.exists() or config.server.socket or os.environ.get("WHISPERD_SOCKET"):
        return own
    system = socket_path(config, {}, uid=0)
    return system if system.exists() else own


def complain(text: str) -> None:
    """Writes an error to stderr, without the secrets of the environment; in the journal each line has its priority."""
    from whisperd.logs import leads_to_journal

    prefix = "<3>" if leads_to_journal(os.environ) else ""
    for line in without_secrets(text).splitlines():
        click.echo(prefix + line, err=True)


def without_secrets(text: str) -> str:
    """The text without any token that the environment holds."""
    from whisperd.config import Config, hide, known_secrets

    return hide(text, known_secrets(Config(), os.environ))


def exit_code(error: Error) -> int:
    """The code that a command exits with; an error of the daemon carries its own."""
    return int(getattr(error, "remote_exit_code", error.exit_code))
