"""The engine for GPUs reads as transformers and CTranslate2 do: real weights, real speech, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.test_contract import decode
from tests.support.hf_export import export
from tests.support.speech import Clip
from whisperd.engine.base import DecodeRequest, Engine
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.speech.features import LogMel
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from whisperd.engine import checkpoints as checkpoint
from whisperd.engine.cuda.caches import Caches
from whisperd.engine.cuda.device import DeviceLogMel
from whisperd.engine.cuda.engine import CudaEngine
from whisperd.engine.cuda.model import Decoder, Encoder
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Runner
from whisperd.engine.cuda.weights import load

torch.set_num_threads(1)
CLIP_S = 12
CLIPS = ["agent", "instruct"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(snapshot, tmp_path_factory.mktemp("hf") / "tiny.en")


@pytest.fixture(scope="module")
def reference(exported: Path) -> Any:
    return transformers.WhisperForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def runner(snapshot: Path, vocabulary: Vocabulary) -> Iterator[Runner]:
    runner = Runner(checkpoint.read(snapshot), vocabulary, device=CPU, dtype=torch.float32, slots=3)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def ct2(snapshot: Path, vocabulary: Vocabulary) -> Iterator[Engine]:
    engine = Ct2Engine.load(snapshot, vocabulary, compute_type="float32", batch_size=1, workers=1, threads_per_worker=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cuda(exported: Path, vocabulary: Vocabulary) -> Iterator[Engine]:
    """Loaded from safetensors."""
    engine = CudaEngine.load(exported, vocabulary, device="cpu", slots=3)
    yield engine
    engine.close()


def window(clip: Clip) -> Samples:
    """The first seconds of a clip."""
    return clip.samples()[: CLIP_S * SAMPLE_RATE_HZ]


def features(clip: Clip) -> Any:
    return torch.from_numpy(LogMel(80)(window(clip)))[None]


def write(runner: Runner, clips: list[Clip], plan: RowPlan) -> list[tuple[int, ...]]:
    """The tokens of clips that are decoded together."""
    rows = list(range(len(clips)))
    runner.encode([window(clip) for clip in clips], rows)
    runner.begin(rows, rows, [plan] * len(clips))
    while set(runner.progress(rows)[0]) != set(rows):
        runner.decode(rows, 4)
    return [text.tokens for text in runner.texts(rows)]


def first_pass(reference: Any, clip: Clip, *, timestamps: bool) -> list[int]:
    """What ``generate`` writes; with timestamps, before it moves on behind the last one of its own accord."""
    if not timestamps:
        plain: list[int] = reference.generate(features(clip))[0].tolist()
        return plain
    found = reference.generate(features(clip), return_timestamps=True, return_segments=True)
    written: list[int] = found["segments"][0][0]["result"].tolist()
    return written[1:-1]


def test_features(clips: dict[str, Clip]) -> None:
    """The spectrogram that the device computes is that of every other engine."""
    samples = clips["agent"].samples()
    padded = torch.zeros(1, 480_000)
    padded[0, : len(samples)] = torch.from_numpy(samples)
    found = DeviceLogMel(80, CPU)(padded)[0].numpy()
    assert np.abs(found - LogMel(80)(samples)).max() < 1e-3


def test_logits(snapshot: Path, reference: Any, clips: dict[str, Clip], vocabulary: Vocabulary) -> None:
    """Every logit of a text differs from transformers' by rounding only."""
    found = checkpoint.read(snapshot)
    encoder, decoder = load(found, CPU, torch.float32)
    caches = Caches.allocate(found.shape, 2, 2, CPU, torch.float32)
    model = Decoder(decoder, found.shape.decoder_heads, caches)
    tokens = torch.tensor([[vocabulary.sot, vocabulary.no_timestamps, *vocabulary.encode(clips["agent"].text)]])
    slot = torch.tensor([1])
    with torch.inference_mode():
        expected = reference(input_features=features(clips["agent"]), decoder_input_ids=tokens)
        states = Encoder(encoder, found.shape.encoder_heads)(features(clips["agent"]))
        model.store(states, slot)
        read, _ = model(tokens, torch.tensor([0]), slot, slot, tokens.shape[1])
        logits = model.logits(read)
    assert (states - expected.encoder_last_hidden_state).abs().max() < 1e-3
    assert (logits - expected.logits).abs().max() < 1e-3


@pytest.mark.parametrize("timestamps", [False, True])
def test_greedy_tokens(
    runner: Runner, reference: Any, clips: dict[str, Clip], vocabulary: Vocabulary, timestamps: bool
) -> None:
    """Token for token what transformers' ``generate`` writes, with and without timestamps, in one batch."""
    prefix = (vocabulary.sot,) if timestamps else (vocabulary.sot, vocabulary.no_timestamps)
    found = write(runner, [clips[name] for name in CLIPS], RowPlan(prefix=prefix, timestamps=timestamps))
    for name, tokens in zip(CLIPS, found, strict=True):
        assert list(tokens) == first_pass(reference, clips[name], timestamps=timestamps)


@pytest.mark.parametrize("name", CLIPS)
def test_as_ctranslate2(ct2: Engine, cuda: Engine, clips: dict[str, Clip], vocabulary: Vocabulary, name: str) -> None:
    """Tokens, scores and word times agree between the engines, with and without a long prompt."""
    prompt = vocabulary.encode(clips["instruct"].text) if name == "agent" else ()
    request = DecodeRequest(word_timestamps=True, prompt_tokens=prompt)
    expected, found = (decode(engine, window(clips[name]), request) for engine in (ct2, cuda))
    assert found.tokens == expected.tokens
    assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
    assert found.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)
    assert found.alignment is not None
    assert expected.alignment is not None
    for one, other in zip(found.alignment, expected.alignment, strict=True):
        assert one.start_s == pytest.approx(other.start_s, abs=0.041)
        assert one.end_s == pytest.approx(other.end_s, abs=0.041)
        assert one.probability == pytest.approx(other.probability, abs=1e-3)
