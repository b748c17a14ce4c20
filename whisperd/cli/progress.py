"""What is shown while a batch runs: lines of text as they come, and a bar in seconds of audio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

OnEvent = Callable[[str, dict[str, Any]], None]

BAR = "{desc}: {percentage:3.0f}% {bar} {n:.0f}/{total:.0f} s, {remaining} left"


class Progress:
    """Hears the events of all files of a batch, from any thread.

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
        """What to call with the events of one file; ``label`` stands before its lines."""

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
    """Shows a bar where it is wanted."""
    if not shown:
        yield Progress(None, live=live)
        return
    from tqdm import tqdm

    with tqdm(desc=description, unit="s", total=1, leave=False, bar_format=BAR) as bar:
        yield Progress(bar, live=live)
