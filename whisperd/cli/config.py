"""``whisperd config``: shows and checks the configuration, and what set each option."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisperd.cli.options import client, config_options, read_checked_config, read_config, socket_option
from whisperd.errors import ExitCode

if TYPE_CHECKING:
    from whisperd.config import Loaded


@click.command()
@config_options
@socket_option
@click.option(
    "--check", is_flag=True, help="Only check the configuration on this machine (exit code 78 if it is wrong)."
)
@click.option(
    "--diff", "against_daemon", is_flag=True, help="Compare with the running daemon; exit code 3 if different."
)
@click.option("--default", "default_file", is_flag=True, help="Print a whisperd.toml with every option at its default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def config(
    context: click.Context,
    config_file: Path | None,
    overrides: Sequence[str],
    socket_file: Path | None,
    check: bool,
    against_daemon: bool,
    default_file: bool,
    as_json: bool,
) -> None:
    """Show every option with its value and who set it."""
    from whisperd.config import render

    if default_file:
        click.echo(render(), nl=False)
        return
    loaded = (read_checked_config if check else read_config)(config_file, overrides)
    click.echo(loaded.header, err=True)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    if check:
        click.echo("configuration is right")
    elif against_daemon:
        running = client(socket_file, config_file, overrides, timeout_s=10.0).status()["config"]["values"]
        changes = list(_differences(loaded, running))
        click.echo("\n".join(changes) or "no difference: the daemon runs this configuration")
        context.exit(ExitCode.PENDING if changes else ExitCode.DONE)
    else:
        click.echo(_as_json(loaded) if as_json else "\n".join(_lines(loaded)))


def _lines(loaded: Loaded) -> Iterator[str]:
    from whisperd.config import effective

    for option in effective(loaded):
        yield f"{option.key} = {option.value}  # {option.origin}"


def _as_json(loaded: Loaded) -> str:
    from whisperd.config import effective

    return json.dumps({option.key: {"value": option.value, "origin": option.origin} for option in effective(loaded)})


def _differences(loaded: Loaded, running: Mapping[str, str]) -> Iterator[str]:
    from whisperd.config import effective

    for option in effective(loaded):
        now = running.get(option.key)
        if now != option.value:
            when = " (after a restart)" if option.reload == "restart" else ""
            yield f"~ {option.key}: {now} -> {option.value}{when}"
