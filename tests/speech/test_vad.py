"""The voice detector detects speech and nothing else, in pieces as well as at once, on any network runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.speech import Clip, noise, silence
from whisperd.speech.units import Samples
from whisperd.speech.vad import Level, SpeechDetector, SpeechNetwork, SpeechStream


@pytest.fixture(params=["onnxruntime", "pytorch"], scope="module")
def network(request: pytest.FixtureRequest, detector: SpeechDetector) -> SpeechNetwork:
    """The network on the CPU, and the network of GPUs on the CPU."""
    if request.param == "onnxruntime":
        return detector
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.set_num_threads(1)
    from whisperd.engine.cuda.vad import DeviceSpeech

    return DeviceSpeech(torch.device("cpu"))


def probabilities(network: SpeechNetwork, samples: Samples, sizes: list[int] | None = None) -> Samples:
    stream = SpeechStream(network)
    parts, rest = [], samples
    for size in sizes or []:
        parts.append(stream.feed(rest[:size]))
        rest = rest[size:]
    return np.concatenate([*parts, stream.feed(rest), stream.finish()])


def test_speech_and_silence(network: SpeechNetwork, clips: dict[str, Clip]) -> None:
    """Speech has a high probability, silence and noise a low one."""
    assert np.median(probabilities(network, clips["monkeys"].samples())) > 0.8
    assert probabilities(network, silence(3.0)).max() < 0.3
    assert probabilities(network, noise(3.0)).max() < 0.5


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 20_000), max_size=6))
def test_pieces(network: SpeechNetwork, clips: dict[str, Clip], sizes: list[int]) -> None:
    """However the audio is split, the probabilities are the same, one for each started frame."""
    samples = clips["agent"].samples()
    whole = probabilities(network, samples)
    assert len(whole) == -(-len(samples) // 512)
    assert np.allclose(probabilities(network, samples, sizes), whole, atol=1e-5)


def test_nothing(network: SpeechNetwork) -> None:
    """No audio gives no frames."""
    assert len(probabilities(network, silence(0.0))) == 0


def test_quiet_speech(detector: SpeechDetector, clips: dict[str, Clip]) -> None:
    """Speech at -50 dB is found where it is found at its own level; louder audio and silence are not changed."""
    samples = clips["agent"].samples()
    quiet = samples * np.float32(10 ** (-50 / 20) / np.sqrt((samples**2).mean()))
    loud, amplified = (SpeechStream(detector).feed(one) for one in (samples, Level().amplify(quiet)))
    assert abs(int(np.argmax(loud > 0.5)) - int(np.argmax(amplified > 0.5))) <= 1
    assert Level().amplify(samples) is samples
    assert not Level().amplify(np.zeros(100, np.float32)).any()
