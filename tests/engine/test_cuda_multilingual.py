"""The engine for GPUs reads other languages as CTranslate2 does: real multilingual weights, real speech, float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.test_contract import drain
from tests.support.speech import Clip
from whisperd.engine.base import DecodeRequest, Engine, Hypothesis, Window
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import Samples

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.engine import CudaEngine

torch.set_num_threads(1)
DATA = Path(__file__).parent.parent / "data"
REQUESTS = (  # clip, and its transcript
    ("es", DecodeRequest()),
    ("fr", DecodeRequest(languages=("es", "fr", "it"))),
    ("es", DecodeRequest(task="translate")),
    ("fr", DecodeRequest(task="translate", language="fr", word_timestamps=True)),
    ("monkeys", DecodeRequest(word_timestamps=True)),
)


@pytest.fixture(scope="module")
def speech(clips: dict[str, Clip]) -> dict[str, Samples]:
    other = {language: Clip(path=DATA / f"{language}.flac", text="") for language in ("es", "fr")}
    return {name: clip.samples() for name, clip in {**clips, **other}.items()}


@pytest.fixture(scope="module")
def many(base: Path) -> Vocabulary:
    return Vocabulary.load(base)


def read(engine: Engine, speech: dict[str, Samples]) -> list[Hypothesis]:
    """All requests in one batch."""
    engine.admit(
        [Window(id=key, samples=speech[name], request=request) for key, (name, request) in enumerate(REQUESTS)]
    )
    outcomes = drain(engine, len(REQUESTS))
    engine.close()
    return [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Hypothesis)]


@pytest.fixture(scope="module")
def expected(base: Path, many: Vocabulary, speech: dict[str, Samples]) -> list[Hypothesis]:
    return read(
        Ct2Engine.load(base, many, compute_type="float32", batch_size=5, workers=1, threads_per_worker=1), speech
    )


@pytest.fixture(scope="module")
def found(base: Path, many: Vocabulary, speech: dict[str, Samples]) -> list[Hypothesis]:
    return read(CudaEngine.load(base, many, device="cpu", slots=5), speech)


def test_ids_are_read(base: Path, many: Vocabulary, vocabulary: Vocabulary) -> None:
    """The ids that steer the model are those of its own files: they differ from those of an English model."""
    declared = json.loads((base / "config.json").read_text())
    listed = json.loads((base / "vocabulary.json").read_text())
    assert sorted(many.languages.values()) == declared["lang_ids"]
    assert many.size == len(listed) == vocabulary.size + 1
    for token, name in (
        (many.sot, "<|startoftranscript|>"),
        (many.eot, "<|endoftext|>"),
        (many.translate, "<|translate|>"),
        (many.no_timestamps, "<|notimestamps|>"),
        (many.timestamp_begin, "<|0.00|>"),
        (many.languages["es"], "<|es|>"),
    ):
        assert listed[token] == name
    assert many.sot != vocabulary.sot


def test_languages(expected: list[Hypothesis], found: list[Hypothesis]) -> None:
    """Detection among all or a few languages gives CTranslate2's probabilities; a given language stays."""
    assert [one.language for one in found] == ["es", "fr", "es", "fr", "en"]
    assert [one.language for one in expected] == [one.language for one in found]
    for one, other in zip(found, expected, strict=True):
        assert one.language_probability == pytest.approx(other.language_probability, abs=1e-3)
    assert found[3].language_probability == 1.0


def test_texts(expected: list[Hypothesis], found: list[Hypothesis], many: Vocabulary) -> None:
    """Transcripts and translations equal CTranslate2's token for token in one mixed batch, and the texts make sense."""
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-3)
        assert one.no_speech_prob == pytest.approx(other.no_speech_prob, abs=1e-3)
    texts = [many.decode(one.tokens) for one in found]
    assert texts[0].strip() == "Por favor ingrese la clave de entrada para la conferencia."
    assert "code d'accès de la conférence" in texts[1]
    assert "Please enter the key" in texts[2]
    assert "conference" in texts[3]


def test_word_times(expected: list[Hypothesis], found: list[Hypothesis]) -> None:
    """Times of translated and of transcribed words, by the heads that the model's file names."""
    for key in (3, 4):
        mine, theirs = found[key].alignment, expected[key].alignment
        assert mine
        assert theirs
        for one, other in zip(mine, theirs, strict=True):
            assert one.start_s == pytest.approx(other.start_s, abs=0.041)
            assert one.end_s == pytest.approx(other.end_s, abs=0.041)
