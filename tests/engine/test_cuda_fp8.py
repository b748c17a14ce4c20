"""Audio kept in 8 bits takes half of the memory, and the words stay right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_whisper import SHAPES
from tests.engine.test_contract import drain
from tests.support.speech import Clip, word_errors
from whisperd.engine.base import DecodeRequest, Hypothesis, Window
from whisperd.errors import EngineError
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import WINDOW_SAMPLES

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.caches import FP8, Caches, in_full
from whisperd.engine.cuda.engine import CudaEngine

torch.set_num_threads(1)
CPU = torch.device("cpu")
MORE_ERRORS_MAX = 0.01  # of the words


@given(exponents=st.lists(st.integers(-10, 10), min_size=6, max_size=6), seed=st.integers(0, 1000))
def test_what_is_kept(exponents: list[int], seed: int) -> None:
    """Whatever the size of a head's numbers, each comes back within a sixteenth; the smallest come back as 0."""
    shape = SHAPES["smoke"]
    caches = Caches.allocate(shape, 4, 1, CPU, torch.float32, fp8_cross=True)
    heads, width = shape.decoder_heads, shape.width // shape.decoder_heads
    sizes = 10.0 ** torch.tensor([(exponents * heads)[:heads], (exponents[::-1] * heads)[:heads]])
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, heads, shape.frames, width, generator=generator) * sizes[:, :, None, None]
    windows = torch.tensor([3, 1])
    caches.put_audio(1, windows, keys, values)
    scales = caches.scales_of(1)
    assert caches.cross_keys.dtype == FP8
    assert scales is not None
    for cache, scale, states in ((caches.cross_keys, scales.keys, keys), (caches.cross_values, scales.values, values)):
        found = in_full(cache[1], windows, scale)
        assert ((found - states).abs() <= states.abs() / 16 + 2e-5 * sizes[:, :, None, None]).all()
    torch.testing.assert_close(
        caches.audio_keys(1, 0, windows), in_full(caches.cross_keys[1], windows, scales.keys)[:, 0]
    )
    assert not caches.cross_keys[0].float().any()


def test_the_words_stay_right(snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip]) -> None:
    """Real weights read real speech with hardly more errors, and times for every word."""
    speech = {name: clip.samples() for name, clip in clips.items()}
    parts = [
        (name, samples[at : at + WINDOW_SAMPLES])
        for name, samples in speech.items()
        for at in range(0, len(samples), WINDOW_SAMPLES)
    ]
    errors = []
    for fp8_cross in (False, True):
        engine = CudaEngine.load(snapshot, vocabulary, device="cpu", slots=5, fp8_cross=fp8_cross)
        texts = dict.fromkeys(speech, "")
        request = DecodeRequest(word_timestamps=True)
        engine.admit([Window(id=key, samples=samples, request=request) for key, (_, samples) in enumerate(parts)])
        outcomes = drain(engine, len(parts))
        for key, (name, _) in enumerate(parts):
            found = outcomes[key]
            assert isinstance(found, Hypothesis)
            assert found.alignment
            texts[name] += vocabulary.decode(found.tokens)
        errors.append(sum(word_errors(clips[name].text, text) for name, text in texts.items()))
        engine.close()
    n_words = sum(len(clip.text.split()) for clip in clips.values())
    assert errors[1] <= errors[0] + MORE_ERRORS_MAX * n_words, errors


def test_old_cards_refuse(snapshot: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without the formats the option is refused, not ignored."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(EngineError, match=r"engine\.fp8_cross.*8\.6.*8\.9.*false"):
        CudaEngine.load(snapshot, vocabulary, device="cuda", fp8_cross=True)
