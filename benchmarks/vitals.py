"""Samples of a process from /proc, their trend, and the limits that they exceed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from whisperd.serving.schema import RequestStatus

MIB = 1 << 20
HOUR_S = 3600.0
SPARE_DESCRIPTORS = 2
SPARE_THREADS = 8  # of the event loop's pool, besides one for each client
CERTAIN_ERRORS = 2.0  # a slope within so many of its standard errors may be chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The figures of a process at one moment. ``own_bytes`` is memory that it shares with no other."""

    at_s: float
    rss_bytes: int
    own_bytes: int
    n_descriptors: int
    n_threads: int
    n_active: int
    n_done: int
    n_failed: int

    def __str__(self) -> str:
        return (
            f"{self.own_bytes / MIB:.0f} MiB of its own, {self.rss_bytes / MIB:.0f} MiB resident, "
            f"{self.n_descriptors} descriptors, {self.n_threads} threads; requests: {self.n_active} active, "
            f"{self.n_done} done, {self.n_failed} failed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A line through samples by least squares, and the standard error of its slope."""

    mib_per_hour: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a healthy run."""

    mib_per_hour: float
    n_clients: int


def take(pid: int, requests: RequestStatus, at_s: float) -> Sample:
    """Takes a sample of a process; ``requests`` are the daemon's own figures."""
    directory = Path(f"/proc/{pid}")
    rollup = _kibibytes(directory / "smaps_rollup")
    return Sample(
        at_s=at_s,
        rss_bytes=rollup["Rss"] * 1024,
        own_bytes=(rollup["Private_Clean"] + rollup["Private_Dirty"]) * 1024,
        n_descriptors=len(list((directory / "fd").iterdir())),
        n_threads=len(list((directory / "task").iterdir())),
        n_active=requests["active"],
        n_done=requests["done"],
        n_failed=requests["failed"],
    )


def _kibibytes(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


def trend(samples: Sequence[Sample]) -> Trend:
    """The growth of the process's own memory; None for fewer than three samples."""
    if len(samples) < 3:
        return Trend(mib_per_hour=math.nan, error=math.nan)
    hours = [sample.at_s / HOUR_S for sample in samples]
    mib = [sample.own_bytes / MIB for sample in samples]
    slope, intercept = statistics.linear_regression(hours, mib)
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(hours, mib, strict=True))
    spread = sum((x - statistics.fmean(hours)) ** 2 for x in hours)
    return Trend(mib_per_hour=slope, error=math.sqrt(left / (len(samples) - 2) / spread))


def complaints(found: Trend, before: Sample, after: Sample, limits: Limits) -> Iterator[str]:
    """The limits that were exceeded. ``before`` and ``after`` are samples of a quiet process after a warm-up."""
    if found.mib_per_hour > max(limits.mib_per_hour, CERTAIN_ERRORS * found.error):
        yield f"memory grows by {found.mib_per_hour:.1f} MiB an hour, more than {limits.mib_per_hour:g}"
    if after.n_descriptors > before.n_descriptors + SPARE_DESCRIPTORS:
        yield f"{after.n_descriptors} descriptors are open, {before.n_descriptors} were before"
    if after.n_threads > before.n_threads + limits.n_clients + SPARE_THREADS:
        yield f"{after.n_threads} threads are left, {before.n_threads} were there before"
    if after.n_active:
        yield f"{after.n_active} requests are still active"
