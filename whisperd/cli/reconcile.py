"""``whisperd reconcile``: bring the cache into the declared state, now."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from whisperd.cli.common import config_options, read_config
from whisperd.errors import UsageError

if TYPE_CHECKING:
    from tqdm import tqdm

    from whisperd.config import Config
    from whisperd.plan import CachePlan
    from whisperd.reconcile import Progress, Report, Settings
    from whisperd.sources import Wanted


@click.command()
@config_options
@click.option(
    "--check", is_flag=True, help="Show the plan and change nothing (exit code 3: changes pending, 4: Hub not asked)."
)
@click.option("--force", is_flag=True, help="Fetch every file anew.")
@click.option("--verify", is_flag=True, help="Hash every file, not only those that changed.")
@click.option("--update", is_flag=True, help="Move to the newest commit of each branch.")
@click.option("-m", "--model", "names", multiple=True, help="Only this model, declared or any reference; repeatable.")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Another cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def reconcile(
    config_file: Path | None,
    overrides: Sequence[str],
    check: bool,
    force: bool,
    verify: bool,
    update: bool,
    names: tuple[str, ...],
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Make the local cache agree with the configuration.

    The plan is printed, then done: fetch, verify, switch. Other tools see the old files or the new ones, never half.
    """
    from whisperd.daemon.settings import store_settings, wanted

    loaded = read_config(config_file, overrides)
    store = store_settings(loaded.config, os.environ)
    store = replace(
        store,
        check=check,
        force=force or store.force,
        verify=verify or store.verify,
        update=update,
        cache_dir=cache_dir.absolute() if cache_dir else store.cache_dir,
    )
    report = _reconcile(_chosen(loaded.config, wanted(loaded.config), names), store, as_json=as_json)
    for line in [json.dumps(report.as_dict())] if as_json else report.lines():
        click.echo(line)
    sys.exit(report.exit_code)


def _reconcile(models: Sequence[Wanted], store: Settings, *, as_json: bool) -> Report:
    from whisperd.reconcile import reconcile as run

    def on_plan(plan: CachePlan) -> None:
        if not as_json:
            click.echo("\n".join(plan.lines()))

    with _interruptible() as cancel, _progress() as on_progress:
        return run(models, store, on_plan=on_plan, on_progress=on_progress, cancel=cancel)


def _chosen(config: Config, models: Sequence[Wanted], names: Sequence[str]) -> Sequence[Wanted]:
    """The declared models that ``-m`` names, by any of their names, or references that are not declared."""
    if not names:
        return models
    known = {
        name: wanted
        for table, wanted in zip(config.models, models, strict=True)
        for name in (*table.names, table.reference)
    }
    return [known.get(name) or _reference(name) for name in names]


def _reference(text: str) -> Wanted:
    from whisperd.errors import SourceError
    from whisperd.sources import Wanted, parse

    try:
        return Wanted(name=text, source=parse(text))
    except SourceError as error:
        raise UsageError(f"-m {text}: not a declared model, and not a reference: {error}") from error


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM: downloads end at once, and nothing is left half done."""
    cancel = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        cancel.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """One bar for each model on a terminal; elsewhere one line when a model begins."""
    bars: dict[str, tqdm[Any]] = {}
    lock = threading.Lock()

    def on_progress(progress: Progress) -> None:
        with lock:
            if progress.name not in bars:
                bars[progress.name] = _bar(progress, len(bars))
            bar = bars[progress.name]
            bar.update(progress.done_bytes - bar.n)

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()


def _bar(progress: Progress, position: int) -> tqdm[Any]:
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    if not shown:
        click.echo(f"fetching {progress.name}: {progress.total_bytes / 1e6:.1f} MB", err=True)
    return tqdm(
        desc=progress.name, total=progress.total_bytes, unit="B", unit_scale=True, position=position, disable=not shown
    )
