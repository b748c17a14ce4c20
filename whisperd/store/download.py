"""The library entry: one model, made present, as a path."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from whisperd.config import DEFAULT_MODEL, Config, checked_token, warnings
from whisperd.errors import ConfigError, SourceError, StoreError
from whisperd.reference import HubSource, parse
from whisperd.store.names import shown
from whisperd.store.plan import CachePlan
from whisperd.store.progress import Progress
from whisperd.store.reconcile import reconcile, snapshots_without_network
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted


def download_model_if_needed(
    model_name: str | None = None,
    force: bool = False,
    logger: logging.Logger | None = None,
    *,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """The directory of a complete, verified model; fetches only what is not there.

    A complete model needs no lock, no network and no write access to the cache. While another process fetches into the
    same cache, a model that is not complete is waited for. May be called from many threads and processes at once.

    Args:
        model_name: ``owner/name[@revision]``, ``path:/dir`` or ``package:module/subdir``; None means ``WHISPER_MODEL``,
            else whisperd's default model.
        force: fetch every file anew; fails when that is not possible, whatever is in the cache.
        logger: gets the plan at INFO; None means whisperd's own.
        cache_dir: a Hugging Face cache; None means the one that the environment names.
        token: for the Hub; None means what the environment holds.

    Raises:
        StoreError: one of its kinds, with what to try; also for arguments of a wrong type.
    """
    if logger is not None and not isinstance(logger, logging.Logger):
        raise StoreError(f"logger: expected a logging.Logger or None, got {shown(logger)}")
    log = logger or logging.getLogger(__name__)

    def on_plan(plan: CachePlan) -> None:
        for line in plan_lines(plan):
            log.info("%s", line)

    settings = download_settings(
        force=force, cache_dir=cache_dir, token=token, on_warning=lambda warning: log.warning("%s", warning)
    )
    return download(model_name, settings, on_plan=on_plan, on_wait=lambda _: None)


def download_settings(
    *,
    force: bool,
    cache_dir: str | Path | None,
    token: str | None = None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> Settings:
    """The settings of a download, by the arguments and the environment; raises StoreError."""
    if not isinstance(force, bool):
        raise StoreError(f"force: expected True or False, got {shown(force)}")
    if cache_dir is not None and (not isinstance(cache_dir, (str, Path)) or "\0" in str(cache_dir)):
        raise StoreError(f"cache_dir: expected a path or None, got {shown(cache_dir)}")
    if token is not None and not isinstance(token, str):
        raise StoreError(f"token: expected text or None, got a value of type {type(token).__name__}")
    try:
        given = checked_token(token, "the argument") if token else None
        for warning in warnings(Config(), os.environ, given):
            on_warning(warning)
        settings = Settings.from_config(Config(force=force), os.environ, given)
    except ConfigError as error:
        raise StoreError(str(error)) from error
    return replace(settings, cache_dir=Path(cache_dir).absolute()) if cache_dir else settings


def download(
    model_name: str | None,
    settings: Settings,
    *,
    on_plan: Callable[[CachePlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Path:
    """The directory of a complete, verified model, as ``download_model_if_needed`` gives it; raises StoreError."""
    name = model_name if model_name is not None else os.environ.get("WHISPER_MODEL") or DEFAULT_MODEL
    if not isinstance(name, str):
        raise SourceError(f"model_name: expected text or None, got {shown(name)}")
    wanted = Wanted(name=name, source=parse(name))
    if not settings.force and (found := snapshots_without_network([wanted], settings)):
        return found[name]
    if not isinstance(wanted.source, HubSource):  # nothing can be fetched: only looked at, to say what is wrong
        settings = replace(settings, check=True)
    report = reconcile([wanted], settings, on_plan=on_plan, on_progress=on_progress, on_wait=on_wait)
    (result,) = report.results
    if result.error is not None:
        raise result.error
    if result.path is None:
        raise StoreError(f"{name}: nothing came of it, and no error either; please report this")
    return result.path
