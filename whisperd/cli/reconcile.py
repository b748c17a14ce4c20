"""``whisperd reconcile``: brings the cache into the declared state, through the daemon if one uses that cache."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from whisperd.cli.options import config_options, daemon_socket, read_config, without_secrets
from whisperd.cli.progress import bars
from whisperd.errors import DaemonUnreachable, UsageError

if TYPE_CHECKING:
    from whisperd.client import Client
    from whisperd.config import Config
    from whisperd.store.plan import CachePlan
    from whisperd.store.reconcile import Progress, Report
    from whisperd.store.settings import Settings
    from whisperd.store.sources import Wanted

ANSWER_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 120.0  # the daemon sends a comment every few seconds


@click.command()
@config_options
@click.option(
    "--check", is_flag=True, help="Show the plan and change nothing (exit code 3: changes pending, 4: Hub not asked)."
)
@click.option("--force", is_flag=True, help="Fetch every file anew.")
@click.option("--verify", is_flag=True, help="Hash every file, not only those that changed.")
@click.option("--update", is_flag=True, help="Move to the newest commit of each branch.")
@click.option("--no-wait", is_flag=True, help="Do not wait for another reconcile on the same cache (exit code 75).")
@click.option(
    "--prune", is_flag=True, help="Remove what whisperd has fetched and the configuration no longer declares."
)
@click.option("-m", "--model", "names", multiple=True, help="Only this model, declared or any reference; repeatable.")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Another cache.")
@click.option(
    "--export", "export_dir", type=click.Path(path_type=Path, file_okay=False), help="Then copy the models to DIR."
)
@click.option(
    "--import",
    "import_dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Take the models from DIR, where --export has put them, and not from the Hub.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def reconcile(
    config_file: Path | None,
    overrides: Sequence[str],
    names: tuple[str, ...],
    cache_dir: Path | None,
    export_dir: Path | None,
    import_dir: Path | None,
    as_json: bool,
    no_wait: bool,
    **flags: bool,
) -> None:
    """Make the local cache agree with the configuration.

    The plan is printed, then done: fetch, verify, switch. Other tools see the old files or the new ones, never half.
    A daemon that works on the same cache is asked to do it, and switches to what is new.
    """
    from whisperd.config import warnings
    from whisperd.store.settings import Settings, declared_models

    if flags["prune"] and names:
        raise UsageError("--prune looks at everything that is declared; leave out -m")
    loaded = read_config(config_file, overrides)
    for warning in (*loaded.warnings, *warnings(loaded.config, os.environ)):
        click.echo(f"warning: {warning}", err=True)
    store = Settings.from_config(loaded.config, os.environ)
    models = _chosen(loaded.config, declared_models(loaded.config), names)
    alone = bool(overrides or cache_dir or export_dir or import_dir)
    if not alone and (daemon := _daemon_of(store.cache_dir, config_file)) is not None:
        _order(daemon, {**flags, "models": [_reference_of(model) for model in models] if names else None}, as_json)
    store = replace(
        store,
        check=flags["check"],
        force=flags["force"] or store.force,
        verify=flags["verify"] or store.verify,
        update=flags["update"],
        prune=(flags["prune"] or store.prune) and not names,
        cache_dir=cache_dir.absolute() if cache_dir else store.cache_dir,
        import_dir=import_dir,
        lock_timeout_s=0.0 if no_wait else store.lock_timeout_s,
    )
    report = _reconcile(models, store, as_json=as_json)
    _print(json.dumps(report.as_dict()) if as_json else report.lines())
    if export_dir is not None and report.exit_code == 0 and not flags["check"]:
        _export(models, store, export_dir)
    sys.exit(report.exit_code)


def _reconcile(models: Sequence[Wanted], store: Settings, *, as_json: bool) -> Report:
    """Reconciles in this process, as the user who owns the cache."""
    from whisperd.store.reconcile import become_owner
    from whisperd.store.reconcile import reconcile as run
    from whisperd.store.report import plan_lines

    def on_plan(plan: CachePlan) -> None:
        if not as_json:
            _print(plan_lines(plan))

    become_owner(store.cache_dir)
    with _interruptible() as cancel, bars() as shown:

        def on_progress(progress: Progress) -> None:
            model, all_ = progress.model, progress.run
            shown.show(
                progress.name,
                (model.done_bytes, model.total_bytes),
                (all_.done_bytes, all_.total_bytes),
                progress.n_models,
            )

        def on_wait(text: str) -> None:
            click.echo(text, err=True)

        return run(models, store, on_plan=on_plan, on_progress=on_progress, on_wait=on_wait, cancel=cancel)


def _export(models: Sequence[Wanted], store: Settings, directory: Path) -> None:
    from whisperd.store.reconcile import export

    for path in export(models, store, directory.absolute()):
        click.echo(f"exported to {path}")


def _daemon_of(cache_dir: Path, config_file: Path | None) -> Client | None:
    """A client of a daemon that answers and uses this cache."""
    from whisperd.client import Client

    path = daemon_socket(config_file, ())
    if not path.exists():
        return None
    try:
        found = Client(path, ANSWER_TIMEOUT_S).status()
    except DaemonUnreachable:
        return None
    return Client(path, SILENCE_TIMEOUT_S) if found.get("cache_dir") == str(cache_dir) else None


def _order(daemon: Client, order: Mapping[str, Any], as_json: bool) -> NoReturn:
    """Sends the order to the daemon. Ctrl-C closes the connection, and the daemon cancels the order."""
    with bars() as shown:

        def on_event(kind: str, found: dict[str, Any]) -> None:
            if kind == "whisperd.plan" and not as_json:
                _print(found["lines"])
            elif kind == "whisperd.progress":
                model, all_ = ((found[key]["done_bytes"], found[key]["total_bytes"]) for key in ("model", "run"))
                shown.show(found["name"], model, all_, found["n_models"])

        report = daemon.reconcile(order, on_event)
    printed = {name: value for name, value in report.items() if name != "lines"}
    _print(json.dumps(printed) if as_json else report["lines"])
    sys.exit(report["exit_code"])


def _print(lines: Sequence[str]) -> None:
    for line in [lines] if isinstance(lines, str) else lines:
        click.echo(without_secrets(line))


def _chosen(config: Config, models: Sequence[Wanted], names: Sequence[str]) -> Sequence[Wanted]:
    """The models of ``-m``: declared ones by any of their names, others by their reference."""
    if not names:
        return models
    known = {
        name: wanted
        for table, wanted in zip(config.models, models, strict=True)
        for name in (*table.names, table.source.base)
    }
    return [known.get(name) or _reference(name) for name in names]


def _reference(text: str) -> Wanted:
    from whisperd.errors import SourceError
    from whisperd.reference import parse
    from whisperd.store.sources import Wanted

    try:
        return Wanted(name=text, source=parse(text))
    except SourceError as error:
        raise UsageError(f"-m {text}: not a declared model, and not a model reference: {error}") from error


def _reference_of(model: Wanted) -> str:
    return str(model.source)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C and SIGTERM set; downloads then end at once, and nothing is left half done."""
    cancel = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        cancel.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
