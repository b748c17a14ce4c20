"""Progress on the terminal: bars of downloads, and the bar and lines of text of a batch of files."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

OnEvent = Callable[[str, dict[str, Any]], None]

ALL = "all models"
BAR = "{desc}: {percentage:3.0f}% {bar} {n:.0f}/{total:.0f} s, {remaining} left"


class Progress:
    """Shows the events of all files of a batch, which may come from any thread.

    Args:
        bar: shows seconds of audio; None shows nothing.
        live: print each segment at once.
    """

    def __init__(self, bar: tqdm[Any] | None, *, live: bool) -> None:
        self._bar = bar
        self._live = live
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, float]] = {}  # file -> seconds done and in all

    def listener(self, key: str, label: str) -> OnEvent:
        """Returns the callback for the events of one file; ``label`` stands before its lines."""

        def on_event(kind: str, data: dict[str, Any]) -> None:
            if kind == "whisperd.progress":
                self._advance(key, data["done_s"], data["total_s"] or data["done_s"])
            elif kind == "whisperd.segment" and self._live:
                self._line(label, data)

        return on_event

    def _advance(self, key: str, done_s: float, total_s: float) -> None:
        if self._bar is None:
            return
        with self._lock:
            self._seen[key] = (done_s, total_s)
            self._bar.total = sum(total_s for _, total_s in self._seen.values())
            self._bar.update(sum(done_s for done_s, _ in self._seen.values()) - self._bar.n)

    def _line(self, label: str, data: dict[str, Any]) -> None:
        from whisperd.speech.formats import short_clock

        line = f"{label}[{short_clock(data['start'])} --> {short_clock(data['end'])}] {data['text'].strip()}"
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            click.echo(line)


@contextmanager
def progress(description: str, *, shown: bool, live: bool) -> Iterator[Progress]:
    """Shows a bar of the batch while the block runs, if ``shown``."""
    if not shown:
        yield Progress(None, live=live)
        return
    from tqdm import tqdm

    with tqdm(desc=description, unit="s", total=1, leave=False, bar_format=BAR) as bar:
        yield Progress(bar, live=live)


class Bars:
    """One bar for each model that is fetched, and one for all of them; used from several threads."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}
        self._lock = threading.Lock()

    def show(self, name: str, model: tuple[int, int], run: tuple[int, int], n_models: int) -> None:
        """Moves the bars of a model and of the run; both as bytes fetched and bytes in all."""
        with self._lock:
            self._set(name, *model)
            if n_models > 1 and sys.stderr.isatty():
                self._set(ALL, *run)

    def close(self) -> None:
        """Closes the bars, which stay on the screen."""
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
    """Yields bars and closes them at the end of the block."""
    shown = Bars()
    try:
        yield shown
    finally:
        shown.close()


def _bar(name: str, done_bytes: int, total_bytes: int, position: int) -> tqdm[Any]:
    from tqdm import tqdm

    from whisperd.store.wording import size

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
