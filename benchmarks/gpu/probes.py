"""Single parts of the engine, each beside what the hardware allows: what to look at when the whole is slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.setup import Setup
from benchmarks.roofline import encoder_flops
from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda.caches import Scales, gathered
from whisperd.engine.cuda.device import DeviceLogMel
from whisperd.engine.cuda.graphs import FixedSteps, sizes
from whisperd.engine.cuda.model import Encoder
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Runner
from whisperd.engine.cuda.vad import Call, DeviceSpeech
from whisperd.engine.cuda.weights import load
from whisperd.speech.units import WINDOW_SAMPLES
from whisperd.speech.vad import STATE_SHAPE

ENCODED = (1, 2, 4, 8, 16)
STREAMS = (1, 4, 16, 26)
BLOCK_FRAMES = 312  # ten seconds
STEPS, LONGEST = 32, 224
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def probe(name: str, found: Checkpoint, setup: Setup, report: Report, *, smoke: bool) -> None:
    """Everything that is not the whole engine; its weights are gone at the end."""
    batches, streams = (ENCODED[:1], STREAMS[:2]) if smoke else (ENCODED, STREAMS)
    probe_encoder(name, found, setup, report, batches)
    probe_attention(name, found, setup, report, (setup.slots,) if smoke else sizes(256))
    runner = setup.runner(found)
    try:
        probe_steps(name, runner, setup, report)
    finally:
        runner.close()
    probe_sound(name, found, setup, report, batches, streams)


def timed(setup: Setup, action: Callable[[], object], *, repeats: int = 5) -> float:
    """Seconds for one call on the device, the calls behind each other; the first ones do not count."""
    action()
    setup.synchronize()
    started_s = time.perf_counter()
    for _ in range(repeats):
        action()
    setup.synchronize()
    return (time.perf_counter() - started_s) / repeats


def probe_encoder(name: str, found: Checkpoint, setup: Setup, report: Report, batches: tuple[int, ...]) -> None:
    """Milliseconds of each batch with each way to compute attention, and which part of the peak that is."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.inference_mode():
        weights, _ = load(found, setup.place, setup.dtype)
        encoder = Encoder(weights, found.shape.encoder_heads)
        for backend in (None, *BACKENDS):
            for batch in batches:
                mel = torch.zeros((batch, found.shape.n_mels, 3000), dtype=setup.dtype, device=setup.device)
                chosen: Any = nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend))
                what = (backend or "chosen by torch").replace("_ATTENTION", "").lower()
                try:
                    with chosen:
                        took_s = timed(setup, lambda mel=mel: encoder(mel))  # type: ignore[misc]
                except RuntimeError as error:  # this card, this size, or this number format
                    report.add("missing", f"encoder, {what}: {error}".splitlines()[0], what=f"encoder, {what}")
                    break
                tflops = batch * encoder_flops(found.shape) / took_s / 1e12
                peak = f"  {100 * tflops * 1e12 / setup.peaks.flops_per_s:5.1f} % of peak" if on_gpu(setup) else ""
                report.add(
                    "encoder",
                    f"encoder, {what:16s} batch {batch:3d}  {1e3 * took_s:9.2f} ms  {1e3 * took_s / batch:8.2f} ms per "
                    f"window  {tflops:7.1f} TFLOP/s{peak}",
                    model=name,
                    backend=what,
                    batch=batch,
                    wall_ms=1e3 * took_s,
                    tflops=tflops,
                )


def probe_attention(name: str, found: Checkpoint, setup: Setup, report: Report, buckets: tuple[int, ...]) -> None:
    """Bytes of keys and values each second, for one layer's attention to the audio, by rows at the same time."""
    shape = found.shape
    heads, width = shape.decoder_heads, shape.width // shape.decoder_heads
    for attention in _attentions(setup):
        for dtype in _types(setup, attention):
            for n_rows in buckets:
                size = (n_rows, heads, shape.frames, width)
                keys, values = (torch.randn(size, dtype=setup.dtype, device=setup.device).to(dtype) for _ in range(2))
                query = torch.randn((n_rows, heads, 1, width), dtype=setup.dtype, device=setup.device)
                slots = torch.arange(n_rows, device=setup.device)
                live = torch.full_like(slots, shape.frames)
                given: list[Any] = [query, keys, values, slots, live, shape.frames, *_scales(dtype, setup, size[:2])]
                took_s = timed(setup, lambda call=attention, given=given: call(*given), repeats=20)  # type: ignore[misc]
                n_bytes = 2 * keys.numel() * keys.element_size()
                gb = n_bytes / took_s / 1e9
                peak = f"  {100 * gb * 1e9 / setup.peaks.bytes_per_s:5.1f} % of peak" if on_gpu(setup) else ""
                kind = str(dtype).removeprefix("torch.")
                report.add(
                    "attention",
                    f"attention, {attention.__name__:8s} {kind:13s} rows {n_rows:3d}  {1e6 * took_s:9.1f} us  "
                    f"{gb:8.1f} GB/s{peak}",
                    model=name,
                    attention=attention.__name__,
                    dtype=kind,
                    rows=n_rows,
                    wall_us=1e6 * took_s,
                    gb_per_s=gb,
                )


def on_gpu(setup: Setup) -> bool:
    """Of a CPU nobody knows the peaks."""
    return setup.device == "cuda"


def _attentions(setup: Setup) -> list[Callable[..., Any]]:
    if not on_gpu(setup):
        return [gathered]
    from whisperd.engine.cuda.kernels import SlotKernels

    def slotted(*given: Any) -> torch.Tensor:
        return SlotKernels().attend(*given)

    return [slotted, gathered]


def _types(setup: Setup, attention: Callable[..., Any]) -> list[torch.dtype]:
    """8 bits too, where this engine can keep them and the device can read them."""
    eight = on_gpu(setup) and attention is not gathered and torch.cuda.get_device_capability() >= (8, 9)
    return [setup.dtype, torch.float8_e4m3fn] if eight else [setup.dtype]


def _scales(dtype: torch.dtype, setup: Setup, size: tuple[int, ...]) -> list[Any]:
    if dtype == setup.dtype:
        return []

    ones = torch.ones(size, device=setup.device)
    return [Scales(keys=ones, values=ones)]


def probe_steps(name: str, runner: Runner, setup: Setup, report: Report) -> None:
    """Milliseconds of one step, by rows at the same time: launched one by one, and recorded where there is a GPU."""
    vocabulary = setup.vocabulary
    silence = np.zeros(WINDOW_SAMPLES, np.float32)
    plan = RowPlan(prefix=(vocabulary.sot,), timestamps=False, min_tokens=LONGEST, max_tokens=LONGEST)
    for row in range(runner.slots):
        runner.encode([silence], [row])
    launched = FixedSteps(runner.write_next, most=runner.slots, padding=runner.slots, device=setup.place)
    recorded = None if runner.recorded is None else runner.recorded.step
    for kind, steps in (("launched", launched), ("recorded", recorded)):
        if steps is None:
            continue
        for n_rows in sizes(runner.slots):
            rows = list(range(min(n_rows, runner.slots)))
            for row in rows:  # anew for each size: texts grow with every step, and attention to them with the texts
                runner.begin([row], [row], [plan])
            _probe_step(name, kind, steps, rows, setup, report)


def _probe_step(name: str, kind: str, steps: FixedSteps, rows: list[int], setup: Setup, report: Report) -> None:
    """``host``: how long the host needs to hand a step over; what is left between two steps is the device's own gap."""
    n_steps = STEPS if on_gpu(setup) else 2

    def several() -> None:
        with torch.inference_mode():
            steps(rows, n_steps, "greedy")

    took_s = timed(setup, several, repeats=3) / n_steps
    setup.synchronize()
    started_s = time.perf_counter()
    several()
    host_s = (time.perf_counter() - started_s) / n_steps
    setup.synchronize()
    busy_s = _busy_s(several) / n_steps if on_gpu(setup) else 0.0
    gap = f"  gaps {max(0.0, 1 - busy_s / took_s):4.0%} of it" if busy_s else ""
    report.add(
        "step",
        f"step, {kind:8s} rows {len(rows):3d}  {1e3 * took_s:8.3f} ms  host {1e3 * host_s:8.3f} ms{gap}",
        model=name,
        how=kind,
        rows=len(rows),
        wall_ms=1e3 * took_s,
        host_ms=1e3 * host_s,
        busy_ms=1e3 * busy_s or None,
    )


def _busy_s(action: Callable[[], None]) -> float:
    """How long kernels ran, without what lies between them; 0 where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        action()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in seen.key_averages())) / 1e6


def probe_sound(
    name: str, found: Checkpoint, setup: Setup, report: Report, batches: tuple[int, ...], streams: tuple[int, ...]
) -> None:
    """Spectrograms of several windows, and the voice detector on several streams beside each other."""
    log_mel = DeviceLogMel(found.shape.n_mels, setup.place)
    with torch.inference_mode():
        for batch in batches:
            samples = torch.randn((batch, WINDOW_SAMPLES), device=setup.device)
            took_s = timed(setup, lambda samples=samples: log_mel(samples))  # type: ignore[misc]
            line = f"log-mel, batch {batch:3d}  {1e3 * took_s:8.3f} ms"
            report.add("mel", line, model=name, batch=batch, wall_ms=1e3 * took_s)
    network = DeviceSpeech(setup.place)
    state = np.zeros(STATE_SHAPE, np.float32)
    frames = np.random.default_rng(0).standard_normal((BLOCK_FRAMES, 576)).astype(np.float32) * 0.1
    for count in streams:
        calls = [Call(frames=frames, hidden=state, cell=state)] * count
        took_s = timed(setup, lambda calls=calls: network.run_all(calls))  # type: ignore[misc]
        rtfx = count * BLOCK_FRAMES * 0.032 / took_s
        line = f"voice detector, {count:3d} streams  {1e3 * took_s:8.3f} ms for 10 s of each  RTFx {rtfx:9.0f}"
        report.add("vad", line, model=name, streams=count, wall_ms=1e3 * took_s, rtfx=rtfx)
