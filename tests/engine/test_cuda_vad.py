"""The voice detector of GPUs gives onnxruntime's results, for one stream or many, with its own reader of weights."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import openers
from tests.support.speech import Clip, noise, silence
from whisperd.daemon.open_model import load
from whisperd.engine.base import Engine
from whisperd.engine.cuda.onnxfile import initializers
from whisperd.engine.factory import EngineSettings
from whisperd.engine.process import ChildEngine
from whisperd.engine.resilient.detector import FallbackDetector
from whisperd.engine.resilient.engine import ResilientEngine
from whisperd.engine.resilient.reopener import Openers
from whisperd.errors import EngineError, SourceError
from whisperd.metrics import ModelMeter
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ
from whisperd.speech.vad import STATE_SHAPE, SpeechDetector, SpeechStream, network_bytes
from whisperd.transcription.request import Transcription

PATIENCE_S = 60.0
CONSTANT = b"\x08\x03\x10\x01\x42\x01x\x4a\x0c" + np.array([1, 2, 3], np.float32).tobytes()


def test_weights_of_the_shipped_network() -> None:
    """Every array is there with its sizes; the spectra are those of a Hann window."""
    found = initializers(network_bytes())
    sizes = {name: value.shape for name, value in found.items()}
    assert sizes == {
        "stft.forward_basis_buffer": (258, 1, 256),
        "encoder.0.weight": (128, 129, 3), "encoder.0.bias": (128,),
        "encoder.1.weight": (64, 128, 3), "encoder.1.bias": (64,),
        "encoder.2.weight": (64, 64, 3), "encoder.2.bias": (64,),
        "encoder.3.weight": (128, 64, 3), "encoder.3.bias": (128,),
        "onnx::LSTM_209": (1, 512, 128), "onnx::LSTM_210": (1, 512, 128), "onnx::LSTM_211": (1, 1024),
        "output.weight": (1, 128, 1), "output.bias": (1,),
    }  # fmt: skip
    assert np.allclose(found["stft.forward_basis_buffer"][0, 0], np.hanning(257)[:-1], atol=1e-6)


def graph(tensor: bytes) -> bytes:
    """A model whose graph has one array."""
    inner = b"\x2a" + bytes([len(tensor)]) + tensor
    return b"\x08\x08\x3a" + bytes([len(inner)]) + inner


def test_reads_protobuf() -> None:
    """Fields of all kinds are skipped or read; numbers may have several bytes."""
    skipped = b"\x0d\x00\x00\x80\x3f" + b"\x11" + bytes(8) + b"\xf8\x07\x96\x01"
    found = initializers(skipped + graph(CONSTANT))
    assert found.keys() == {"x"}
    assert found["x"].tolist() == [1, 2, 3]


@given(cut=st.integers(1, len(CONSTANT) - 1))
def test_damaged_files(cut: int) -> None:
    """A truncated file is refused."""
    with pytest.raises(SourceError, match="ONNX"):
        initializers(graph(CONSTANT)[:-cut])


def test_other_types() -> None:
    """Weights of another type are refused, not misread."""
    with pytest.raises(SourceError, match="'x' has type 10"):
        initializers(graph(CONSTANT.replace(b"\x10\x01", b"\x10\x0a")))


torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.vad import Call, DeviceSpeech


@pytest.fixture(scope="module")
def network() -> DeviceSpeech:
    torch.set_num_threads(1)
    return DeviceSpeech(torch.device("cpu"))


@pytest.mark.parametrize("name", ["agent", "instruct", "monkeys"])
def test_equals_onnxruntime(network: DeviceSpeech, detector: SpeechDetector, clips: dict[str, Clip], name: str) -> None:
    """Real speech in one stream: the same probability for each frame within 1e-5."""
    samples = clips[name].samples()
    ours, theirs = (SpeechStream(one).feed(samples) for one in (network, detector))
    assert theirs.max() > 0.9
    assert np.abs(ours - theirs).max() < 1e-5


def test_equals_onnxruntime_between_silence_and_noise(
    network: DeviceSpeech, detector: SpeechDetector, clips: dict[str, Clip]
) -> None:
    """At edges between silence and noise, where rounding matters, both stay as near to each other as to float64."""
    samples = np.concatenate([silence(0.5), clips["instruct"].samples(), silence(1.0), noise(1.0)])
    ours, theirs = (SpeechStream(one).feed(samples) for one in (network, detector))
    assert np.abs(ours - theirs).max() < 3e-5


@settings(max_examples=15)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_streams_beside_each_other(network: DeviceSpeech, counts: list[int], seed: int) -> None:
    """Several streams of any lengths and states give what each gives alone."""
    generator = np.random.default_rng(seed)

    def drawn(*size: int) -> np.ndarray:
        return (generator.standard_normal(size) * 0.3).astype(np.float32)

    calls = [Call(frames=drawn(n, 576), hidden=drawn(*STATE_SHAPE), cell=drawn(*STATE_SHAPE)) for n in counts]
    for call, together in zip(calls, network.run_all(calls), strict=True):
        alone = network.run(call.frames, call.hidden, call.cell)
        assert [part.shape for part in together] == [(len(call.frames),), STATE_SHAPE, STATE_SHAPE]
        for one, other in zip(alone, together, strict=True):
            assert np.allclose(one, other, atol=1e-5)


def test_many_threads(network: DeviceSpeech, clips: dict[str, Clip]) -> None:
    """Streams of many threads do not mix their states."""
    recordings = [clips[name].samples()[start:] for name in ("agent", "monkeys") for start in range(0, 4000, 500)]

    def heard(samples: np.ndarray) -> np.ndarray:
        stream = SpeechStream(network)
        return np.concatenate([stream.feed(samples[at : at + 9000]) for at in range(0, len(samples), 9000)])

    alone = [SpeechStream(network).feed(samples) for samples in recordings]
    with ThreadPoolExecutor(len(recordings)) as pool:
        for one, other in zip(alone, pool.map(heard, recordings), strict=True):
            assert np.allclose(one, other, atol=1e-5)


def test_answers_are_plain_arrays(network: DeviceSpeech) -> None:
    """Answers contain no PyTorch type, since an engine may be in another process."""
    state = np.zeros(STATE_SHAPE, np.float32)
    answer = network.run(np.ones((3, 576), np.float32), state, state)
    assert all(type(part) is np.ndarray and part.dtype == np.float32 for part in answer)


def test_failures_have_a_name(network: DeviceSpeech) -> None:
    """What PyTorch raises becomes an error of whisperd."""
    state = np.zeros(STATE_SHAPE, np.float32)
    with pytest.raises(EngineError, match="PyTorch failed"):
        network.run(np.zeros((2, 575), np.float32), state, state)


class Refusing:
    """A network that must not be used."""

    def run(self, *_: object) -> NoReturn:
        raise AssertionError("the cpu was asked")


def test_the_engine_brings_it(snapshot: Path, tmp_path: Path, clips: dict[str, Clip]) -> None:
    """A model on this engine uses its detector, from the first inference on and in the engine's own process."""

    def opener(path: Path, _: Vocabulary, __: EngineSettings, ___: Path, meter: ModelMeter) -> Engine:
        return ChildEngine(partial(openers.cuda, path), stall_timeout_s=PATIENCE_S, meter=meter)

    model = load("tiny.en", snapshot, EngineSettings(), tmp_path, Refusing(), opener=opener)
    try:
        with clips["monkeys"].path.open("rb") as file:
            assert "carried away by monkeys" in Transcription(model, Options(), CutOptions()).run(file).text
    finally:
        model.batcher.close()


def test_the_cpu_continues_a_stream(snapshot: Path, detector: SpeechDetector, clips: dict[str, Clip]) -> None:
    """When the engine's process stops, the CPU continues a stream from the state where it stopped."""
    samples = clips["instruct"].samples()[: 20 * SAMPLE_RATE_HZ]
    expected = SpeechStream(detector).feed(samples)
    engine = ChildEngine(partial(openers.cuda, snapshot), stall_timeout_s=PATIENCE_S)
    lasting = ResilientEngine(engine, Openers(main=lambda: engine), name="x")
    try:
        stream = SpeechStream(FallbackDetector(lasting, detector))
        first = stream.feed(samples[: 10 * SAMPLE_RATE_HZ])
        assert engine.health.pid is not None
        os.kill(engine.health.pid, signal.SIGKILL)
        found = np.concatenate([first, stream.feed(samples[10 * SAMPLE_RATE_HZ :])])
    finally:
        lasting.close()
    np.testing.assert_allclose(found, expected, atol=1e-5)
