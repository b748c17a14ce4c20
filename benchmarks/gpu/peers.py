"""Others on the same weights, the same windows and the same lengths of text, each as it is used at its best."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.meter import Meter, Spent
from benchmarks.gpu.report import Report
from benchmarks.gpu.setup import Setup, missing
from benchmarks.gpu.work import MIXES, Work, check, padded, windows
from benchmarks.random_whisper import written
from whisperd.engine.cuda.checkpoint import Checkpoint
from whisperd.engine.cuda.mel import DeviceLogMel

Peer = Callable[[torch.Tensor, Sequence[int]], Sequence[int]]  # spectrograms and lengths to lengths of the texts


def measure_peers(name: str, found: Checkpoint, setup: Setup, report: Report, options: argparse.Namespace) -> None:
    """All that are installed; what is missing is said."""
    if missing("transformers"):
        report.add("missing", "transformers is not installed: not compared", what="transformers")
    else:
        _measure_transformers(name, found, setup, report, options)
    if missing("whisper"):
        report.add("missing", "openai-whisper is not installed: not compared", what="openai-whisper")
    else:
        peer = openai_whisper(found, setup)
        _measure(f"openai-whisper, batch {options.batches[0]}", name, peer, options.batches[0], setup, report, options)
    _measure_ctranslate2(name, found, setup, report, options)


def _measure_transformers(
    name: str, found: Checkpoint, setup: Setup, report: Report, options: argparse.Namespace
) -> None:
    model = reference(found, setup)
    peer = partial(generate, model, setup)
    for batch in options.batches:
        _measure(f"transformers, batch {batch}", name, peer, batch, setup, report, options)
    # as run_eval.py of the Open ASR leaderboard does it: one shape, so that nothing is compiled twice
    model.generation_config.cache_implementation = "static"
    if options.compile:
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    batch = options.batches[-1]
    what = "static cache, compiled" if options.compile else "static cache"
    _measure(f"transformers, {what}, batch {batch}", name, peer, batch, setup, report, options, whole=True)


def _measure(
    system: str,
    model: str,
    peer: Peer,
    batch: int,
    setup: Setup,
    report: Report,
    options: argparse.Namespace,
    *,
    whole: bool = False,
) -> None:
    """``whole``: only whole batches, for peers that are compiled for one size."""
    for mix in options.mixes:
        count = options.reference_windows
        work = MIXES[mix](np.random.default_rng(3), max(batch, count // batch * batch) if whole else count)
        run_peer(peer, work[:batch], batch, setup)  # warms up
        report.throughput(model, system, mix, work, [run_peer(peer, work, batch, setup) for _ in range(options.rounds)])


def run_peer(peer: Peer, work: Sequence[Work], batch: int, setup: Setup) -> Spent:
    """Batch after batch; spectrograms are made on the device too."""
    log_mel = DeviceLogMel(setup_mels(peer), setup.place)
    everything = windows(work)
    with Meter(setup.device) as spent:
        for at in range(0, len(work), batch):
            samples = torch.from_numpy(padded(everything[at : at + batch])).to(setup.device)
            lengths = [one.n_tokens for one in work[at : at + batch]]
            for length, wanted in zip(peer(log_mel(samples).to(setup.dtype), lengths), lengths, strict=True):
                check(length, wanted)
        setup.synchronize()
    return spent


def setup_mels(peer: Any) -> int:
    """How many bands the model of a peer hears."""
    model = peer.args[0]
    return int(model.dims.n_mels if hasattr(model, "dims") else model.config.num_mel_bins)


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
    model = whisper.Whisper(dims).to(setup.device, setup.dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter
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


def _measure_ctranslate2(
    name: str, found: Checkpoint, setup: Setup, report: Report, options: argparse.Namespace
) -> None:
    """Only where it loads on the device: its wheels want CUDA 12's libraries. Lengths are those of the weights."""
    if missing("ctranslate2"):
        report.add("missing", "ctranslate2 is not installed: not compared", what="ctranslate2")
        return
    import ctranslate2

    from whisperd.convert import converted

    n_tokens, batch = options.ctranslate2_tokens, options.batches[0]
    vocabulary = setup.vocabulary
    with tempfile.TemporaryDirectory() as directory:
        snapshot = written(found, setup.snapshot, Path(directory) / "model", n_tokens=n_tokens)
        try:
            path = converted(snapshot, Path(directory), "float16")
            model = ctranslate2.models.Whisper(str(path), device=setup.device, compute_type=setup.compute_type)
            work = MIXES["constant"](np.random.default_rng(0), options.reference_windows)
            features = np.zeros((batch, found.shape.n_mels, 3000), np.float32)

            def decode(_: Sequence[Work]) -> Spent:
                with Meter(setup.device) as spent:
                    for _at in range(0, len(work), batch):
                        view = ctranslate2.StorageView.from_array(features)
                        for result in model.generate(view, [[vocabulary.sot]] * batch, beam_size=1):
                            check(len(result.sequences_ids[0]), n_tokens)
                return spent

            decode(work)  # warms up
            runs = [decode(work) for _ in range(options.rounds)]
        except (RuntimeError, ValueError) as error:
            report.add("missing", f"ctranslate2 does not run here: {error}", what="ctranslate2", why=str(error))
            return
    report.throughput(name, f"ctranslate2, batch {batch}", "constant", work, runs)
