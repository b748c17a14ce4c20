"""Others on the same weights, the same windows and the same lengths of text, each as it is used at its best."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.meter import Meter, Spent
from benchmarks.gpu.report import Report
from benchmarks.gpu.setup import Setup, missing
from benchmarks.gpu.work import MIXES, Work, WrongLengthError, check, padded, windows
from benchmarks.random_whisper import written
from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda.device import DeviceLogMel

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, WrongLengthError)
Peer = Callable[[torch.Tensor, Sequence[int]], Sequence[int]]  # spectrograms and lengths to lengths of the texts


def measure_peers(name: str, found: Checkpoint, setup: Setup, report: Report, options: argparse.Namespace) -> None:
    """All that are installed; what is missing is said, and so is why one failed."""
    measures: dict[str, Callable[[Bench], None]] = {
        "transformers": measure_transformers,
        "whisper": measure_openai_whisper,
        "ctranslate2": measure_ctranslate2,
    }
    bench = Bench(name=name, found=found, setup=setup, report=report, options=options)
    for module, measure in measures.items():
        setup.start_afresh()
        if missing(module):
            report.add("missing", f"{module} is not installed: not compared", what=module)
        else:
            bench.attempt(module, partial(measure, bench))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One model that peers are measured on."""

    name: str
    found: Checkpoint
    setup: Setup
    report: Report
    options: argparse.Namespace

    def attempt(self, system: str, measure: Callable[[], None]) -> None:
        """A peer that fails must not cost the figures of the others."""
        try:
            measure()
        except FAILURES as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.report.add("failed", f"{system} does not run here: {why}", what=system, why=why)

    def measure(self, system: str, peer: Peer, batch: int, *, whole: bool = False) -> None:
        """``whole``: only whole batches, for peers that are compiled for one size."""
        for mix in self.options.mixes:
            count = self.options.reference_windows
            work = MIXES[mix](np.random.default_rng(3), max(batch, count // batch * batch) if whole else count)
            self.run(peer, work[:batch], batch)  # warms up
            runs = [self.run(peer, work, batch) for _ in range(self.options.rounds)]
            self.report.throughput(self.name, system, mix, work, runs)

    def run(self, peer: Peer, work: Sequence[Work], batch: int) -> Spent:
        """Batch after batch; spectrograms are made on the device too."""
        setup, everything = self.setup, windows(work)
        log_mel = DeviceLogMel(self.found.shape.n_mels, setup.place)
        with Meter(setup.device) as spent:
            for at in range(0, len(work), batch):
                samples = torch.from_numpy(padded(everything[at : at + batch])).to(setup.device)
                lengths = [one.n_tokens for one in work[at : at + batch]]
                for length, wanted in zip(peer(log_mel(samples).to(setup.dtype), lengths), lengths, strict=True):
                    check(length, wanted)
            setup.synchronize()
        return spent


def measure_transformers(bench: Bench) -> None:
    """Batches of several sizes, then one compiled."""
    model, options = reference(bench.found, bench.setup), bench.options
    peer = partial(generate, model, bench.setup)
    for batch in options.batches:
        system = f"transformers, batch {batch}"
        bench.attempt(system, partial(bench.measure, system, peer, batch))
    # as run_eval.py of the Open ASR leaderboard does it: one shape, so that nothing is compiled twice
    model.generation_config.cache_implementation = "static"
    if options.compile:
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    batch = options.batches[-1]
    what = "static cache, compiled" if options.compile else "static cache"
    bench.measure(f"transformers, {what}, batch {batch}", peer, batch, whole=True)


def measure_openai_whisper(bench: Bench) -> None:
    """Its own decoding, in the smallest of the batches."""
    batch = bench.options.batches[0]
    bench.measure(f"openai-whisper, batch {batch}", openai_whisper(bench.found, bench.setup), batch)


def generate(model: Any, setup: Setup, spectrograms: torch.Tensor, lengths: Sequence[int]) -> list[int]:
    """``generate`` of transformers, as its pipeline calls it."""
    from transformers import LogitsProcessorList

    eot = setup.vocabulary.eot
    force = LogitsProcessorList([_Forced(lengths, eot, setup.device)])
    texts = model.generate(spectrograms, logits_processor=force, max_new_tokens=max(lengths) + 1)
    return [len(text) - text.count(eot) for text in texts.tolist()]


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
    """The weights in transformers, with its fastest attention that needs nothing else."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    shape, vocabulary = found.shape, setup.vocabulary
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
    return model.to(setup.device, setup.dtype)


def openai_whisper(found: Checkpoint, setup: Setup) -> Peer:
    """openai-whisper's own decoding of a batch, on other random weights: their values do not change its speed."""
    import whisper

    shape = found.shape
    dims = whisper.ModelDimensions(
        n_mels=shape.n_mels,
        n_audio_ctx=shape.frames,
        n_audio_state=shape.width,
        n_audio_head=shape.encoder_heads,
        n_audio_layer=shape.encoder_layers,
        n_vocab=shape.vocabulary_size,
        n_text_ctx=shape.positions,
        n_text_state=shape.width,
        n_text_head=shape.decoder_heads,
        n_text_layer=shape.decoder_layers,
    )
    torch.manual_seed(0)
    model = whisper.Whisper(dims).to(setup.device).eval()  # it keeps float32 and rounds as it computes
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return partial(_openai_decode, model, setup)


def _openai_decode(model: Any, setup: Setup, spectrograms: torch.Tensor, lengths: Sequence[int]) -> list[int]:
    from whisper.decoding import DecodingOptions, DecodingTask

    half = setup.dtype == torch.float16
    options = DecodingOptions(language="en", without_timestamps=True, fp16=half, sample_len=max(lengths) + 1)
    task = DecodingTask(model, options)
    force = _Forced(lengths, task.tokenizer.eot, setup.device)

    class Filter:
        """In place, as its filters work."""

        def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
            logits.copy_(force(tokens, logits))

    task.logit_filters = [Filter()]
    return [len(result.tokens) for result in task.run(spectrograms)]


def measure_ctranslate2(bench: Bench) -> None:
    """Only where it loads on the device: its wheels want CUDA 12's libraries. Its lengths are those of the weights."""
    import ctranslate2

    from whisperd.engine.checkpoints import converted

    setup, options = bench.setup, bench.options
    n_tokens, batch, sot = options.ctranslate2_tokens, options.batches[0], setup.vocabulary.sot
    work = [Work(duration_s=23.3, n_tokens=n_tokens)] * (-(-options.reference_windows // batch) * batch)
    features = np.zeros((batch, bench.found.shape.n_mels, 3000), np.float32)
    with tempfile.TemporaryDirectory() as directory:
        snapshot = written(bench.found, setup.snapshot, Path(directory) / "model", n_tokens=n_tokens)
        path = converted(snapshot, Path(directory), "float16")
        model = ctranslate2.models.Whisper(str(path), device=setup.device, compute_type=setup.compute_type)

        def decode() -> Spent:
            with Meter(setup.device) as spent:
                for _ in range(0, len(work), batch):
                    view = ctranslate2.StorageView.from_array(features)
                    for result in model.generate(view, [[sot]] * batch, beam_size=1):
                        check(len(result.sequences_ids[0]), n_tokens)
            return spent

        decode()  # warms up
        runs = [decode() for _ in range(options.rounds)]
    bench.report.throughput(bench.name, f"ctranslate2, batch {batch}", "constant", work, runs)
