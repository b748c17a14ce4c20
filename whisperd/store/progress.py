"""How far downloads are: bytes, rate and time left, of each model and of all together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from whisperd.store.wording import size

RATE_OVER_S = 10.0  # long enough to be steady, short enough to notice a link that has become slow
EVERY_S = 0.2
ALL = ""
NAME_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Bytes that are there of those that are wanted; what an earlier run has left counts as there."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate; None where nobody can say."""
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.bytes_per_s else None

    def text(self) -> str:
        """``45 % of 1.6 GB, 34.5 MB/s, 0:31 left``"""
        percent = 100 * self.done_bytes // self.total_bytes if self.total_bytes else 100
        rate = f", {size(round(self.bytes_per_s))}/s" if self.bytes_per_s else ""
        left = "" if self.left_s is None else f", {clock_text(self.left_s)} left"
        return f"{percent} % of {size(self.total_bytes)}{rate}{left}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the download of one model is, and how far all are that this run does."""

    name: str
    model: Amount
    run: Amount
    n_models: int = 1

    def text(self) -> str:
        """One line for people."""
        mine = f"downloading {self.name}: {self.model.text()}"
        return f"{mine}; all {self.n_models} models: {self.run.text()}" if self.n_models > 1 else mine


def progress_from(value: object) -> Progress | None:
    """A progress that another process has published, made by ``dataclasses.asdict``; None for anything else."""
    match value:
        case {"name": str(name), "n_models": int(n_models), "model": dict(model), "run": dict(run)}:
            amounts = [_amount_from(one) for one in (model, run)]
        case _:
            return None
    if amounts[0] is None or amounts[1] is None:
        return None
    return Progress(name=name[:NAME_CHARS], model=amounts[0], run=amounts[1], n_models=n_models)


def _amount_from(value: Mapping[str, object]) -> Amount | None:
    match value:
        case {"done_bytes": int(done), "total_bytes": int(total), "bytes_per_s": float(rate) | int(rate)}:
            return Amount(done_bytes=done, total_bytes=total, bytes_per_s=float(rate))
        case _:
            return None


class Tracker:
    """Counts the bytes of several models, from several threads.

    Args:
        total_bytes: of each model that is fetched.
        tell: hears of progress, a few times a second for each model.
        clock_s: seconds from any beginning.
    """

    def __init__(
        self,
        total_bytes: Mapping[str, int],
        tell: Callable[[Progress], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_bytes = total_bytes
        self._tell = tell
        self._clock_s = clock_s
        self._done_bytes: dict[str, int] = {}
        self._told_at_s: dict[str, float] = {}
        self._rates = {name: _Rate() for name in (ALL, *total_bytes)}
        self._moved_bytes = 0
        self._lock = threading.Lock()

    def at(self, name: str, n_bytes: int) -> None:
        """A model has this many bytes now; the first word of each is where it begins."""
        with self._lock:
            progress = self._counted(name, n_bytes)
        if progress is not None:
            self._tell(progress)

    def _counted(self, name: str, n_bytes: int) -> Progress | None:
        now_s = self._clock_s()
        self._moved_bytes += n_bytes - self._done_bytes.get(name, n_bytes)
        self._done_bytes[name] = n_bytes
        whole = n_bytes >= self._total_bytes[name]
        if not whole and now_s - self._told_at_s.get(name, -EVERY_S) < EVERY_S:
            return None
        self._told_at_s[name] = now_s
        return Progress(
            name=name,
            model=self._amount(name, n_bytes, self._total_bytes[name], n_bytes, now_s),
            run=self._amount(
                ALL, sum(self._done_bytes.values()), sum(self._total_bytes.values()), self._moved_bytes, now_s
            ),
            n_models=len(self._total_bytes),
        )

    def _amount(self, name: str, done_bytes: int, total_bytes: int, moved_bytes: int, now_s: float) -> Amount:
        rate = self._rates[name].after(moved_bytes, now_s)
        return Amount(done_bytes=min(done_bytes, total_bytes), total_bytes=total_bytes, bytes_per_s=rate)


class _Rate:
    """Bytes a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, n_bytes: int, now_s: float) -> float:
        self._seen.append((now_s, n_bytes))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= RATE_OVER_S:
            self._seen.popleft()
        (then_s, then_bytes) = self._seen[0]
        return max(0.0, (n_bytes - then_bytes) / (now_s - then_s)) if now_s > then_s else 0.0


def clock_text(duration_s: float) -> str:
    """``0:31``, ``2:03``, ``1:02:03``"""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
