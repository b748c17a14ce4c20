"""Downloads as bars on a terminal, as one line for each model elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

ALL = "all models"


class Bars:
    """One bar for each model that is fetched, and one for all of them; used from several threads."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}
        self._lock = threading.Lock()

    def show(self, name: str, model: tuple[int, int], run: tuple[int, int], n_models: int) -> None:
        """How far a model is, and all; each as bytes that are there and bytes that are wanted."""
        with self._lock:
            self._set(name, *model)
            if n_models > 1 and sys.stderr.isatty():
                self._set(ALL, *run)

    def close(self) -> None:
        """Leaves them as they are."""
        for bar in self._bars.values():
            bar.close()

    def _set(self, name: str, done_bytes: int, total_bytes: int) -> None:
        if name not in self._bars:
            self._bars[name] = _bar(name, done_bytes, total_bytes, len(self._bars))
        bar = self._bars[name]
        bar.total = total_bytes
        bar.update(done_bytes - bar.n)


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars that are closed at the end."""
    shown = Bars()
    try:
        yield shown
    finally:
        shown.close()


def _bar(name: str, done_bytes: int, total_bytes: int, position: int) -> tqdm[Any]:
    from tqdm import tqdm

    from whisperd.store.plan import size

    shown = sys.stderr.isatty()
    if not shown:
        click.echo(f"fetching {name}: {size(total_bytes)}", err=True)
    return tqdm(
        desc=name,
        total=total_bytes,
        initial=done_bytes,
        unit="B",
        unit_scale=True,
        position=position,
        disable=not shown,
    )
