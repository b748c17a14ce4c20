"""What was found, as lines for people and as records for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.meter import Spent
from benchmarks.gpu.work import Work, percentile


@dataclass(slots=True, kw_only=True)
class Report:
    """``facts`` are about the machine; ``records`` about one measurement each, with units in their names."""

    facts: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    def say(self, line: str) -> None:
        """For people alone."""
        print(line, flush=True)

    def add(self, kind: str, line: str, **figures: Any) -> None:
        """One record, and its line."""
        self.records.append({"kind": kind, **figures})
        self.say(f"  {line}")

    def throughput(
        self, model: str, system: str, mix: str, work: Sequence[Work], runs: Sequence[Spent], floor_s: float = 0.0
    ) -> float:
        """The same work several times; ``floor_s`` is the least time for one window, 0 where nobody knows it.

        Returns windows each second.
        """
        rates = [len(work) / run.wall_s for run in runs]
        rate = statistics.median(rates)
        hours = sum(one.duration_s for one in work) / 3600
        n_tokens = sum(one.n_tokens for one in work)
        joules = [run.joules for run in runs if run.joules is not None]
        figures = {
            "windows_per_s": rate,
            "windows_per_s_min": min(rates),
            "windows_per_s_max": max(rates),
            "rtfx": rate * hours * 3600 / len(work),
            "tokens_per_s": rate * n_tokens / len(work),
            "roofline_percent": 100 * rate * floor_s if floor_s else None,
            "cpu_s_per_audio_hour": statistics.median(run.cpu_s for run in runs) / hours,
            "joules_per_audio_hour": statistics.median(joules) / hours if joules else None,
        }
        line = (
            f"{system + ', ' + mix:40s} {rate:8.2f} windows/s ({min(rates):.2f}-{max(rates):.2f})  "
            f"RTFx {figures['rtfx']:8.1f}  {figures['tokens_per_s']:9.0f} tokens/s  "
            f"{figures['cpu_s_per_audio_hour']:7.1f} CPU s per hour"
        )
        line += f"  {figures['joules_per_audio_hour']:9.0f} J per hour" if joules else ""
        line += f"  {figures['roofline_percent']:5.1f} % of roofline" if floor_s else ""
        self.add("throughput", line, model=model, system=system, mix=mix, n_windows=len(work), **figures)
        return rate

    def latency(self, model: str, what: str, latencies_s: Sequence[float], **figures: Any) -> None:
        """How long somebody waited."""
        p50_s, p99_s = percentile(latencies_s, 50), percentile(latencies_s, 99)
        line = f"{what:40s} p50 {p50_s:7.3f} s  p99 {p99_s:7.3f} s"
        line += "".join(f"  {name} {value:.2f}" for name, value in figures.items())
        self.add("latency", line, model=model, what=what, p50_s=p50_s, p99_s=p99_s, n=len(latencies_s), **figures)

    def write(self, path: Path | None) -> None:
        """Everything as JSON: to a file, else as the last line."""
        whole = json.dumps({**self.facts, "records": self.records})
        if path is None:
            print(whole, flush=True)
        else:
            path.write_text(whole + "\n", encoding="utf-8")
