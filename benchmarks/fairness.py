"""Latency of a short clip every second beside an hour-long file, and the speed of that file, on one server.

    pip install -e '.[embedded]'
    python -m benchmarks.fairness CLIP LONG [--hours 1.0] [--idle-s 60] [--rounds 1] [--limit-s 1800]

The same load runs on peers, too, with ``--systems whisperd wyoming-faster-whisper whisper.cpp``:

    pip install wyoming-faster-whisper       # for its client; --wyoming says which Python serves, if not this one
    # in a checkout of ggml-org/whisper.cpp, for --whisper-cpp build/bin/whisper-server --ggml tiny.en-q8_0.bin
    cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target whisper-server whisper-quantize
    models/download-ggml-model.sh tiny.en
    build/bin/whisper-quantize models/ggml-tiny.en.bin tiny.en-q8_0.bin q8_0

Each round has three runs for each system, each on a fresh server that has answered once: clips alone (the idle server),
the file alone, both. LONG is repeated until it is long enough. A clip is sent when its second comes, whether or not the
ones before are answered, and its latency counts from that second, so that a server which is stuck cannot hide it. After
``--limit-s`` a server is stopped, and requests without an answer count as lost. Windows of whisperd are
those it decoded, of peers 30 s of the file or one clip each. In all runs the
server's status is asked for four times a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.systems import TROUBLE, Answer, System, WhisperCpp, Whisperd, WyomingFasterWhisper, running
from whisperd.speech import audio
from whisperd.speech.units import SAMPLE_RATE_HZ

EVERY_S = 1.0
LOOK_EVERY_S = 0.25
THREADS_MAX = 10_000  # a thread for each clip that waits
KINDS = ("clips alone", "file alone", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The outcome of one file; ``latency_s`` counts from when it was due, and is infinite when nothing came."""

    latency_s: float
    answer: Answer | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The measurements of one run."""

    wall_s: float
    clips: Sequence[Reply] = ()
    file: Reply | None = None
    looks_s: Sequence[float] = ()

    @property
    def windows_per_s(self) -> float:
        """Windows of all files that came back, until the last one did."""
        replies = [*self.clips, *([self.file] if self.file else [])]
        return sum(reply.answer.n_windows for reply in replies if reply.answer) / self.wall_s


def ask(system: System, path: Path, due_s: float) -> Reply:
    """Sends one file; latency counts from the moment at which it was due."""
    try:
        answer = system.ask(path)
    except TROUBLE as error:
        return Reply(latency_s=math.inf, trouble=getattr(error, "remote_code", "") or type(error).__name__)
    return Reply(latency_s=time.perf_counter() - due_s, answer=answer)


def run(system: System, clip: Path | None, long: Path | None, *, duration_s: float) -> Run:
    """Sends clips until the file is done, or for ``duration_s`` without one; returns when the last one is answered."""
    over = threading.Event()
    with ThreadPoolExecutor(THREADS_MAX) as pool, looking(system) as looks_s:
        started_s = time.perf_counter()
        file = pool.submit(ask, system, long, started_s) if long else None
        if file is not None:
            file.add_done_callback(lambda _: over.set())
        n_clips = math.inf if file else duration_s / EVERY_S
        clips: list[Future[Reply]] = []
        while clip and len(clips) < n_clips:
            due_s = started_s + len(clips) * EVERY_S
            if over.wait(max(0.0, due_s - time.perf_counter())) and clips:
                break
            clips.append(pool.submit(ask, system, clip, due_s))
        replies = [one.result() for one in clips]
        found = file.result() if file else None
        wall_s = time.perf_counter() - started_s
    return Run(wall_s=wall_s, clips=replies, file=found, looks_s=tuple(looks_s))


@contextmanager
def looking(system: System) -> Iterator[list[float]]:
    """Asks for the status in a thread of its own; yields the seconds that each answer took."""
    found: list[float] = []
    over = threading.Event()

    def look() -> None:
        while True:  # once at least, however short the run is
            started_s = time.perf_counter()
            try:
                system.status()
            except TROUBLE:
                found.append(math.inf)
            else:
                found.append(time.perf_counter() - started_s)
            if over.wait(LOOK_EVERY_S):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def measure(system: System, kind: str, clip: Path, long: Path, *, duration_s: float, limit_s: float) -> Run:
    """Measures one run on a fresh server, which is stopped at the limit."""
    with running(system, clip) as process:
        limit = threading.Timer(limit_s, process.kill)
        limit.start()
        try:
            return run(
                system,
                None if kind == "file alone" else clip,
                None if kind == "clips alone" else long,
                duration_s=duration_s,
            )
        finally:
            limit.cancel()


def make_long(source: Path, target: Path, duration_s: float) -> None:
    """Repeats a recording until it is long enough, as a wav file."""
    with source.open("rb") as file:
        samples = np.concatenate(list(audio.blocks(file)))
    data = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    with wave.open(str(target), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        for _ in range(max(1, -(-round(duration_s * SAMPLE_RATE_HZ) // len(samples)))):
            writer.writeframes(data)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that is at least as large as the given percentage of all values."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def figures(found: Run) -> dict[str, float]:
    """The figures of a run; infinite where no answer came."""
    numbers = {"windows_per_s": found.windows_per_s}
    if found.clips:
        latencies_s = [reply.latency_s for reply in found.clips]
        numbers |= {
            "clips": len(latencies_s),
            "clips_lost": sum(map(math.isinf, latencies_s)),
            "p50_s": percentile(latencies_s, 50),
            "p99_s": percentile(latencies_s, 99),
            "max_s": max(latencies_s),
        }
    if found.file:
        answer = found.file.answer
        numbers |= {"file_s": found.file.latency_s, "file_words": answer.n_words if answer else 0}
    if found.looks_s:
        numbers |= {"status_p99_s": percentile(found.looks_s, 99), "status_max_s": max(found.looks_s)}
    return numbers


def medians(rounds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's median over the rounds."""
    everything = list(rounds)
    return {name: statistics.median(one[name] for one in everything if name in one) for name in everything[0]}


def show_run(system: System, kind: str, found: Run, limit_s: float) -> None:
    """Prints one line."""
    numbers = figures(found)
    shown = [f"{numbers['windows_per_s']:5.2f} windows/s"]
    if found.file:
        shown.append(f"file {seconds(numbers['file_s'], limit_s)} s, {numbers['file_words']:.0f} words")
    if found.clips:
        parts = (seconds(numbers[name], limit_s) for name in ("p50_s", "p99_s", "max_s"))
        shown.append("clips {}: p50 {} s, p99 {} s, max {} s".format(len(found.clips), *parts))
    if found.looks_s:
        shown.append(f"status p99 {seconds(numbers['status_p99_s'], limit_s, 1000)} ms")
    print(f"  {system.name:24s}{kind:12s} {'; '.join(shown)}", flush=True)
    lost = Counter(reply.trouble for reply in (*found.clips, *([found.file] if found.file else [])) if reply.trouble)
    for trouble, count in lost.items():
        print(f"  {'':24s}{count} did not come back within {limit_s:.0f} s ({trouble})", flush=True)


def seconds(value_s: float, limit_s: float, unit: float = 1.0) -> str:
    """A time as text, or that the limit was reached."""
    return f"> {limit_s * unit:.0f}" if math.isinf(value_s) else f"{value_s * unit:.{0 if unit > 1 else 2}f}"


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]], limit_s: float) -> Iterator[str]:
    """The table of medians, with a row for each system."""
    yield (
        f"{'':24s}{'clips alone, s':^24s}{'clips beside the file, s':^24s}{'times':^12s}{'file, s':^16s}"
        f"{'windows/s':^22s}{'status, ms':>12s}"
    )
    yield (
        f"{'':24s}{'p50':>8s}{'p99':>8s}{'max':>8s}{'p50':>8s}{'p99':>8s}{'max':>8s}{'p50':>6s}{'p99':>6s}"
        f"{'alone':>8s}{'both':>8s}{'alone':>7s}{'both':>7s}{'change':>8s}{'p99, both':>12s}"
    )
    for name, kinds in found.items():
        idle, alone, both = (kinds[kind] for kind in KINDS)
        times = [seconds(one[key], limit_s) for one in (idle, both) for key in ("p50_s", "p99_s", "max_s")]
        factors = [ratio(both[key], idle[key]) for key in ("p50_s", "p99_s")]
        files = [seconds(one["file_s"], limit_s) for one in (alone, both)]
        rates = [one["windows_per_s"] for one in (alone, both)]
        change = f"{100 * (rates[1] / rates[0] - 1):+.1f} %" if rates[0] else ""
        yield (
            f"{name:24s}{''.join(f'{one:>8s}' for one in times)}{''.join(f'{one:>6s}' for one in factors)}"
            f"{''.join(f'{one:>8s}' for one in files)}{''.join(f'{one:7.2f}' for one in rates)}{change:>8s}"
            f"{seconds(both['status_p99_s'], limit_s, 1000):>12s}"
        )


def ratio(value: float, base: float) -> str:
    """The ratio of two times as text."""
    return "" if math.isinf(value) or math.isinf(base) else f"{value / base:.1f}"


def as_json(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Medians as JSON; null where no answer came."""
    finite = {
        name: {
            kind: {key: None if math.isinf(value) else round(value, 4) for key, value in numbers.items()}
            for kind, numbers in kinds.items()
        }
        for name, kinds in found.items()
    }
    return json.dumps(finite)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", type=Path)
    parser.add_argument("long", type=Path)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["whisperd"])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=1800.0)
    parser.add_argument("--wyoming", type=Path, default=Path(sys.executable), help="Python that serves Wyoming")
    parser.add_argument("--whisper-cpp", type=Path, default=Path("whisper-server"), help="its server")
    parser.add_argument("--ggml", type=Path, default=Path("ggml-tiny.en-q8_0.bin"), help="its weights")
    return parser.parse_args(words)


SYSTEMS: Mapping[str, Callable[[Path, argparse.Namespace], System]] = {
    "whisperd": lambda directory, _: Whisperd(directory),
    "wyoming-faster-whisper": lambda directory, options: WyomingFasterWhisper(directory, options.wyoming),
    "whisper.cpp": lambda _, options: WhisperCpp(options.whisper_cpp, options.ggml),
}


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line and prints the table."""
    options = parse(words)
    with tempfile.TemporaryDirectory(prefix="whisperd-fairness-") as name:
        directory = Path(name)
        compare([SYSTEMS[system](directory, options) for system in options.systems], directory, options)


def compare(systems: Sequence[System], directory: Path, options: argparse.Namespace) -> None:
    """Measures all runs, systems in turn; returns their figures."""
    clip, long = directory / "clip.wav", directory / "long.wav"
    make_long(options.clip, clip, 0.0)
    make_long(options.long, long, options.hours * 3600)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    runs: dict[str, dict[str, list[Mapping[str, float]]]] = {one.name: {kind: [] for kind in KINDS} for one in systems}
    for _ in range(options.rounds):
        for system in systems:
            for kind in KINDS:
                found = measure(system, kind, clip, long, duration_s=options.idle_s, limit_s=options.limit_s)
                show_run(system, kind, found, options.limit_s)
                runs[system.name][kind].append(figures(found))
    whole = {name: {kind: medians(done) for kind, done in kinds.items()} for name, kinds in runs.items()}
    print("\n".join(table(whole, options.limit_s)))
    print(as_json(whole))


if __name__ == "__main__":
    main()
