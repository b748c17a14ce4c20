"""``whisperd status``, ``models`` and ``reload``: short requests to the running daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from whisperd.cli.options import client, config_options, socket_option

if TYPE_CHECKING:
    from whisperd.serving.schema import ModelStatus, Status

ANSWER_TIMEOUT_S = 10.0
RELOAD_TIMEOUT_S = 24 * 3600.0  # a reload may have to fetch a large model first


@click.command()
@config_options
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(config_file: Path | None, overrides: Sequence[str], socket_file: Path | None, as_json: bool) -> None:
    """Show the state of the daemon."""
    found = client(socket_file, config_file, overrides, ANSWER_TIMEOUT_S).status()
    click.echo(json.dumps(found) if as_json else "\n".join(_status_lines(found)))


@click.command()
@config_options
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(config_file: Path | None, overrides: Sequence[str], socket_file: Path | None, as_json: bool) -> None:
    """List the models of the daemon, the default one first."""
    found = client(socket_file, config_file, overrides, ANSWER_TIMEOUT_S).models()
    if as_json:
        click.echo(json.dumps(found))
        return
    for model in found:
        names = ", ".join([model["id"], *model["aliases"]])
        revision = f"@{model['revision']}" if model["revision"] else ""
        click.echo(f"{names}  {model['source']}{revision}  {'loaded' if model['loaded'] else 'not loaded'}")


@click.command(short_help="Make the daemon read its configuration again.")
@config_options
@socket_option
def reload(config_file: Path | None, overrides: Sequence[str], socket_file: Path | None) -> None:
    """Make the daemon read its configuration again, and wait for the outcome."""
    outcome = client(socket_file, config_file, overrides, RELOAD_TIMEOUT_S).reload()
    for warning in outcome["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    for key in outcome["needs_restart"]:
        click.echo(f"warning: {key} changes with the next restart", err=True)
    for change in outcome["changed"]:
        click.echo(f"~ {change}")
    click.echo("reloaded" if outcome["changed"] else "reloaded, nothing changed")


def _status_lines(found: Status) -> Iterator[str]:
    requests, settings = found["requests"], found["config"]
    yield f"whisperd {found['version']}, pid {found['pid']}, up {found['uptime_s']:.0f} s"
    yield f"{found['phase']:9} {found['note']}"
    yield f"config    {settings['file'] or 'built-in defaults'}"
    last = settings["last_reload"]
    if last is not None:
        yield "reload    ok" if last["ok"] else f"reload    failed: {last['error']}"
    for key in settings["needs_restart"]:
        yield f"restart   {key} waits for a restart"
    for warning in settings["warnings"]:
        yield f"warning   {warning}"
    for problem in found["problems"]:
        yield f"problem   {problem}"
    for model in found["models"]:
        yield f"model     {_model_line(model)}"
    yield (
        f"requests  {requests['active']} active, {requests['done']} done, {requests['failed']} failed, "
        f"{requests['audio_s']:.0f} s of audio"
    )


def _model_line(model: ModelStatus) -> str:
    if model["failure"]:
        return f"{model['name']} DOWN: {model['failure']}; it is being opened again"
    if not model["loaded"]:
        return f"{model['name']} (not loaded)"
    return (
        f"{model['name']} on {model['device']} ({model['compute_type']}): {model['windows_running']} of "
        f"{model['slots']} slots, {model['windows_waiting']} windows wait"
        + (f"; engine replaced {model['engine_restarts']} times" if model["engine_restarts"] else "")
        + (f"; IN PLACE OF A GPU: {model['fallback']}" if model["fallback"] else "")
    )
