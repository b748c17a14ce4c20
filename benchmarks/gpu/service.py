"""The daemon over its socket, on a model of true size: the same speech as PCM and as mp3, long files, and both at once.

Its model has random weights whose texts end after so many tokens (``random_whisper.written``), since a daemon cannot be
told lengths: every window costs what a real one costs, and there is nothing to decode again.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.gpu.meter import Meter, Spent
from benchmarks.gpu.report import Report
from benchmarks.gpu.setup import Setup, missing
from benchmarks.random_whisper import TOKENS, written
from whisperd.client import Client
from whisperd.engine.checkpoints import Checkpoint
from whisperd.errors import DaemonUnreachable

NEEDED = (
    "av", "click", "httptools", "huggingface_hub", "multipart", "onnxruntime", "packaging", "prometheus_client",
    "pydantic", "sdnotify", "starlette", "tokenizers", "tomli", "tqdm", "uvicorn",
)  # fmt: skip
PATIENCE_S = 900.0
KNOWN_IDS = 51_864  # of the tokenizer that the model is given
LOAD = 0.3
CLIPS = (2.0, 10.0)  # seconds of those who wait for an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One daemon: how to ask it, its process, and how long it took to be ready."""

    client: Client
    pid: int
    ready_s: float

    def ask(self, path: Path, fields: dict[str, str] | None = None) -> int:
        """Sends a file and waits for its text; returns how many windows that were."""
        with path.open("rb") as file:
            answer = self.client.transcribe(
                file, filename=path.name, fields=fields or {}, on_event=lambda _kind, _data: None
            )
        return int(answer["x_whisperd"]["windows"]["decoded"])


@contextmanager
def serving(directory: Path, snapshot: Path, setup: Setup) -> Iterator[Served]:
    """A daemon of its own; no window is decoded twice."""
    config = directory / "whisperd.toml"
    config.write_text(
        f'models = ["path:{snapshot}"]\ncache_dir = "{directory}/cache"\nlog_level = "warning"\n'
        f'[server]\nsocket = "{directory}/whisperd.sock"\nspool_dir = "{directory}"\n'
        f'[engine]\ndevice = "{setup.device}"\ncompute_type = "{setup.compute_type}"\n'
        f"{'fp8_cross = true' if setup.fp8 else ''}\n[limits]\nrequests = 1000\n"
        # its texts repeat themselves, and shall be written to their end
        "[decode]\ntemperatures = [0.0]\ncompression_ratio_threshold = inf\n"
    )
    started_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "whisperd", "serve", "-c", str(config)])
    client = Client(directory / "whisperd.sock", PATIENCE_S)
    try:
        while not _is_ready(client):
            if process.poll() is not None:
                raise SystemExit("the daemon did not start; its last words are above")
            time.sleep(0.05)
        yield Served(client=client, pid=process.pid, ready_s=time.perf_counter() - started_s)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def _is_ready(client: Client) -> bool:
    try:
        return client.ready()
    except DaemonUnreachable:
        return False


def measure_daemon(
    name: str, found: Checkpoint, setup: Setup, report: Report, options: argparse.Namespace, alone: float
) -> None:
    """``alone`` is what the engine did without a daemon, windows each second; 0 where nobody knows."""
    absent = missing(*NEEDED)
    if absent:
        report.add("missing", f"daemon: not measured without {', '.join(absent)}", what="daemon", modules=absent)
        return
    known = replace(found.shape, vocabulary_size=KNOWN_IDS)
    cut = {**found.tensors, TOKENS: found.tensors[TOKENS][:KNOWN_IDS]}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        model = replace(found, shape=known, tensors=cut)
        snapshot = written(model, setup.snapshot, path / "model", n_tokens=options.daemon_tokens)
        with serving(path, snapshot, setup) as served:
            report.add("start", f"daemon ready in {served.ready_s:.1f} s", model=name, ready_s=served.ready_s)
            _measure(name, served, path, report, options, alone)


def _measure(
    name: str, served: Served, directory: Path, report: Report, options: argparse.Namespace, alone: float
) -> None:
    from benchmarks.recordings import recordings

    show = _Shower(name=name, report=report, alone=alone, device=options.device, pid=served.pid)
    forms = {form: (path, s) for form, path, s in recordings(directory, options.daemon_s, ["PCM", "mp3"])}
    served.ask(forms["PCM"][0])  # warms up
    rate = 0.0
    for form, (path, duration_s) in forms.items():
        files = [(path, duration_s)] * options.clients
        rate = show(f"daemon, {options.clients} x {duration_s:.0f} s of {form}", served, files)
    lengths_s = np.linspace(options.daemon_s / 3, 2 * options.daemon_s, max(2, options.clients // 2))
    files = [(path, s) for at, s in enumerate(lengths_s) for _, path, s in recordings(_made(directory, at), s, ["mp3"])]
    show(f"daemon, {len(files)} files of {lengths_s[0]:.0f} to {lengths_s[-1]:.0f} s of mp3", served, files)
    _interactive(name, served, directory, report, options, rate, files)


def _made(directory: Path, number: int) -> Path:
    path = directory / f"long-{number}"
    path.mkdir()
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shower:
    """Asks for files at the same time, and says what that took."""

    name: str
    report: Report
    alone: float
    device: str
    pid: int

    def __call__(self, what: str, served: Served, files: Sequence[tuple[Path, float]]) -> float:
        """Returns windows each second."""
        with Meter(self.device, self.pid) as spent, ThreadPoolExecutor(len(files)) as pool:
            n_windows = sum(pool.map(served.ask, [path for path, _ in files]))
        audio_s = sum(duration_s for _, duration_s in files)
        self._add(what, n_windows, audio_s, spent)
        return n_windows / spent.wall_s

    def _add(self, what: str, n_windows: int, audio_s: float, spent: Spent) -> None:
        rate, hours = n_windows / spent.wall_s, audio_s / 3600
        part = f"  {100 * rate / self.alone:5.1f} % of the engine alone" if self.alone else ""
        self.report.add(
            "daemon",
            f"{what:40s} {rate:8.2f} windows/s  RTFx {audio_s / spent.wall_s:8.1f}  "
            f"{spent.cpu_s / hours:7.1f} CPU s per hour{part}",
            model=self.name,
            what=what,
            windows_per_s=rate,
            rtfx=audio_s / spent.wall_s,
            cpu_s_per_audio_hour=spent.cpu_s / hours,
            joules_per_audio_hour=None if spent.joules is None else spent.joules / hours,
            percent_of_engine=100 * rate / self.alone if self.alone else None,
        )


def _interactive(
    name: str,
    served: Served,
    directory: Path,
    report: Report,
    options: argparse.Namespace,
    rate: float,
    files: Sequence[tuple[Path, float]],
) -> None:
    """Short clips at a third of what the daemon does, alone and beside long files."""
    from benchmarks.recordings import FORMS, speech, write

    clips = []
    for number, duration_s in enumerate(np.random.default_rng(4).uniform(*CLIPS, 16)):
        clips.append(directory / f"clip-{number}.mp3")
        write(clips[-1], speech(float(duration_s)), FORMS["mp3"])
    alone = _latencies(served, clips, LOAD * rate, options.clips)
    report.latency(name, "daemon, interactive alone, 30 % load", alone)
    over = threading.Event()
    with ThreadPoolExecutor(len(files)) as pool:
        bulk = [pool.submit(_again_and_again, served, path, over) for path, _ in files]
        started_s = time.perf_counter()
        beside = _latencies(served, clips, LOAD * rate, options.clips)
        over.set()
        n_bulk = sum(one.result() for one in bulk)
        bulk_rate = n_bulk / (time.perf_counter() - started_s)
    report.latency(
        name, "daemon, interactive over bulk", beside, bulk_windows_per_s=bulk_rate, alone_windows_per_s=rate
    )


def _again_and_again(served: Served, path: Path, over: threading.Event) -> int:
    n_windows = 0
    while not over.is_set():
        n_windows += served.ask(path, {"priority": "bulk"})
    return n_windows


def _latencies(served: Served, clips: Sequence[Path], rate: float, count: int) -> list[float]:
    """Seconds from the first byte sent to the last byte of the answer; clips come by chance."""
    generator = np.random.default_rng(6)

    def timed(path: Path) -> float:
        started_s = time.perf_counter()
        served.ask(path)
        return time.perf_counter() - started_s

    due_s = time.perf_counter()
    with ThreadPoolExecutor(256) as pool:
        asked = []
        for number in range(count):
            due_s += generator.exponential(1 / rate)
            time.sleep(max(0.0, due_s - time.perf_counter()))
            asked.append(pool.submit(timed, clips[number % len(clips)]))
        return [one.result() for one in asked]
