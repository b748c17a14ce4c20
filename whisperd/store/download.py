"""The library entry: one model, made present, as a path."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from whisperd.config import DEFAULT_MODEL, Config
from whisperd.errors import StoreError
from whisperd.reference import parse
from whisperd.store.plan import CachePlan
from whisperd.store.reconcile import reconcile
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

    Args:
        model_name: ``owner/name[@revision]``, ``path:/dir`` or ``package:module/subdir``; None means ``WHISPER_MODEL``,
            else whisperd's default model.
        force: fetch every file anew; fails when that is not possible, whatever is in the cache.
        logger: told the plan at INFO; None means whisperd's own.
        cache_dir: a Hugging Face cache; None means the one that the environment names.
        token: for the Hub; None means what the environment holds.

    Raises:
        StoreError: one of its kinds, with what to try.
    """
    log = logger or logging.getLogger(__name__)
    settings = Settings.from_config(Config(force=force), os.environ)
    if cache_dir:
        settings = replace(settings, cache_dir=Path(cache_dir).absolute())
    if token:
        settings = replace(settings, token=token)
    name = model_name or os.environ.get("WHISPER_MODEL") or DEFAULT_MODEL

    def on_plan(plan: CachePlan) -> None:
        for line in plan_lines(plan):
            log.info("%s", line)

    (result,) = reconcile([Wanted(name=name, source=parse(name))], settings, on_plan=on_plan).results
    if result.error is not None:
        raise result.error
    if result.path is None:
        raise StoreError(f"{name}: nothing came of it, and no error either; please report this")
    return result.path
