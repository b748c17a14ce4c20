"""Opens an engine for a snapshot: on the CPU, or on a GPU in a process of its own."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from whisperd.engine.base import Engine
from whisperd.engine.checkpoints import converted
from whisperd.engine.checkpoints.safetensors import is_ctranslate2, is_huggingface
from whisperd.engine.cpu.encoder import Encode
from whisperd.engine.cpu.unpadded import ShortWindows
from whisperd.engine.devices import absence, obstacle, set_kernel_cache
from whisperd.engine.process import ChildEngine
from whisperd.errors import EngineError, OutOfMemory, SourceError
from whisperd.metrics import ModelMeter
from whisperd.speech.tokenizer import Vocabulary

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
EncoderName = Literal["auto", "ctranslate2", "openvino"]
# CTranslate2 quantises while it loads. Weights that are stored as int8 give slightly other scores than those that are
# quantised from float16 (measured on tiny.en), and published conversions are float16
STORED_TYPES = {"float32": "float32", "bfloat16": "bfloat16"}
STORED_TYPE = "float16"
THREADS_MAX = 4  # beyond this more workers gain more than more threads
CPU_COMPUTE_TYPE = "int8"  # the fastest on every CPU that CTranslate2 supports, at no measured loss of accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How engines are opened. 0 workers or threads: from the usable cores; 0 gpu_bytes: all free memory.

    ``own_process`` is for the cpu: GPUs always have one. ``cpu_fallback`` lets the cpu serve when the GPU is lost;
    ``stall_timeout_s`` is the silence after which an engine in its own process counts as hung.

    Two batches in flight hide each other's serial stages, and threads that share one cost CPU time: measured on two
    cores, two workers of two threads need a tenth more of it than two of one. Batches of 8 decode a token for 0.8 of
    what it costs in batches of 4, for more memory.
    """

    device: Device = "auto"
    compute_type: str = "auto"
    encoder: EncoderName = "auto"
    batch_size: int = 4
    workers: int = 0
    threads_per_worker: int = 0
    short_windows: ShortWindows = "auto"
    gpu_bytes: int = 0
    fp8_cross: bool = False
    own_process: bool = False
    cpu_fallback: bool = False
    stall_timeout_s: float = 300.0

    def placed(self, n_cores: int) -> tuple[int, int]:
        """Workers, and threads of each, on a machine with so many usable cores."""
        threads = self.threads_per_worker or max(1, min(THREADS_MAX, n_cores // 2))
        return self.workers or max(min(2, n_cores), n_cores // threads), threads


def open_engine(
    snapshot: Path,
    vocabulary: Vocabulary,
    settings: EngineSettings,
    work_dir: Path,
    meter: ModelMeter | None = None,
) -> Engine:
    """Loads a snapshot in either format; ``work_dir`` keeps conversions. Raises SourceError or EngineError.

    An engine on a GPU is in a process of its own: an error of CUDA spoils the whole process in which it happens.
    """
    missing = absence() if settings.device != "cpu" else None
    if missing is not None:
        settings = replace(settings, device=_without_gpu(settings.device, missing))
    if settings.device == "cpu" and not settings.own_process:
        return _on_cpu(snapshot, vocabulary, settings, work_dir, meter)
    opener = partial(_open_here, snapshot, settings, work_dir)
    return ChildEngine(opener, stall_timeout_s=settings.stall_timeout_s, meter=meter)


def _open_here(snapshot: Path, settings: EngineSettings, work_dir: Path, meter: ModelMeter) -> Engine:
    """Opens an engine in this process, which is its own."""
    vocabulary = Vocabulary.load(snapshot)
    missing = obstacle() if settings.device != "cpu" else None
    if missing is not None:
        settings = replace(settings, device=_without_gpu(settings.device, missing))
    if settings.device == "cpu":
        return _on_cpu(snapshot, vocabulary, settings, work_dir, meter)
    from whisperd.engine.cuda.engine import CudaEngine

    set_kernel_cache(work_dir)
    return CudaEngine.load(
        snapshot,
        vocabulary,
        device="cuda",
        compute_type=settings.compute_type,
        budget_bytes=settings.gpu_bytes,
        fp8_cross=settings.fp8_cross,
        meter=meter,
    )


def _without_gpu(device: Device, missing: str) -> Device:
    if device == "cuda":
        raise EngineError(f"engine.device is 'cuda', but {missing}; 'auto' and 'cpu' work without a GPU")
    log.info("engine.device is 'auto' and takes the cpu: %s", missing)
    return "cpu"


def _on_cpu(
    snapshot: Path, vocabulary: Vocabulary, settings: EngineSettings, work_dir: Path, meter: ModelMeter | None
) -> Engine:
    from whisperd.engine.cpu.engine import Ct2Engine

    workers, threads = settings.placed(len(os.sched_getaffinity(0)))
    compute_type = CPU_COMPUTE_TYPE if settings.compute_type == "auto" else settings.compute_type
    path = _ctranslate2_dir(snapshot, work_dir, compute_type)
    return Ct2Engine.load(
        path,
        vocabulary,
        compute_type=compute_type,
        batch_size=settings.batch_size,
        workers=workers,
        threads_per_worker=threads,
        encode=_encoder(settings.encoder, path, compute_type, workers, threads),
        short_windows=settings.short_windows,
        meter=meter,
    )


def _encoder(name: EncoderName, path: Path, compute_type: str, workers: int, threads: int) -> Encode | None:
    """OpenVINO's encoder, or None for CTranslate2's own."""
    if name == "ctranslate2":
        return None
    if importlib.util.find_spec("openvino") is None:
        if name == "openvino":
            raise EngineError("engine.encoder is 'openvino', but it is not installed: pip install 'whisperd[openvino]'")
        return None
    from whisperd.engine.cpu.openvino import OpenVinoEncoder

    try:
        encoder = OpenVinoEncoder.load(path, compute_type=compute_type, streams=workers, threads_per_stream=threads)
    except EngineError as error:
        if name == "openvino" or isinstance(error, OutOfMemory):
            raise
        log.warning("%s; CTranslate2 encodes instead", error)
        return None
    log.info("OpenVINO encodes in %s", encoder.precision)
    return encoder


def _ctranslate2_dir(snapshot: Path, work_dir: Path, compute_type: str) -> Path:
    if is_ctranslate2(snapshot):
        return snapshot
    if is_huggingface(snapshot):
        return converted(snapshot, work_dir, STORED_TYPES.get(compute_type, STORED_TYPE))
    raise SourceError(
        f"{snapshot} holds no Whisper model; expected model.bin (CTranslate2) or "
        "config.json with model.safetensors (Hugging Face)"
    )
