"""Every family of Whisper loads and decodes: its spectrograms, vocabulary, layers and the types of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_whisper import SHAPES
from tests.engine.test_contract import drain
from tests.engine.test_cuda_engine import audio, talkative
from tests.speech.test_tokenizer import multilingual
from tests.support.hf_export import Tensors, write_shards
from whisperd.engine.base import DecodeRequest, Engine, Hypothesis, Window
from whisperd.engine.checkpoints import converted
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.speech.tokenizer import Vocabulary

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda.engine import CudaEngine

torch.set_num_threads(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a release differs from the others; widths are tiny."""

    layers: tuple[int, int]
    n_mels: int
    vocabulary_size: int
    shards: int = 1
    dtype: str = "float32"


FAMILIES = {
    "english": Family(layers=(2, 2), n_mels=80, vocabulary_size=51_864, dtype="bfloat16"),
    "multilingual": Family(layers=(1, 3), n_mels=80, vocabulary_size=51_865),
    "large-v3": Family(layers=(2, 2), n_mels=128, vocabulary_size=51_866, dtype="float16", shards=2),
    "turbo": Family(layers=(3, 4), n_mels=128, vocabulary_size=51_866, dtype="float16"),
    "distil": Family(layers=(3, 2), n_mels=128, vocabulary_size=51_866, shards=3),
}


def tokenizer(snapshot: Path, target: Path, size: int) -> Vocabulary:
    """The tokenizer of models of this size: one id more for many languages, another for Cantonese."""
    target.mkdir()
    if size == 51_864:
        (target / "tokenizer.json").write_bytes((snapshot / "tokenizer.json").read_bytes())
    else:
        multilingual(snapshot, target)
    if size == 51_866:
        found = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
        first = next(token["id"] for token in found["added_tokens"] if token["content"] == "<|translate|>")
        later = [token for token in found["added_tokens"] if token["id"] >= first]
        for token in later:
            token["id"] += 1
        found["added_tokens"].append({**later[0], "id": first, "content": "<|yue|>"})
        found["added_tokens"].sort(key=lambda token: token["id"])
        (target / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
    (target / "config.json").write_text(json.dumps({"vocab_size": size}))
    return Vocabulary.load(target)


def written(found: Checkpoint, vocabulary: Vocabulary, target: Path, family: Family) -> None:
    """A generated checkpoint in the layout of transformers, beside its tokenizer."""
    shape = found.shape
    config = {
        "model_type": "whisper",
        "vocab_size": shape.vocabulary_size,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "encoder_attention_heads": shape.encoder_heads,
        "decoder_attention_heads": shape.decoder_heads,
        "eos_token_id": vocabulary.eot,
    }
    (target / "config.json").write_text(json.dumps(config))
    languages = {f"<|{code}|>": token for code, token in vocabulary.languages.items()}
    generation = {"suppress_tokens": [], "begin_suppress_tokens": [vocabulary.eot], "lang_to_id": languages}
    (target / "generation_config.json").write_text(json.dumps(generation))
    half = family.dtype == "float16"
    tensors: Tensors = {name: tensor.astype(np.float16) if half else tensor for name, tensor in found.tensors.items()}
    write_shards(tensors, target, family.shards, bfloat16=family.dtype == "bfloat16")


def read(engine: Engine, *, many: bool) -> list[Hypothesis]:
    request = DecodeRequest(language="fr" if many else None, task="translate" if many else "transcribe")
    requests = (request, replace(request, prompt_tokens=(100, 101)))
    engine.admit([Window(id=key, samples=audio(key), request=one) for key, one in enumerate(requests)])
    outcomes = drain(engine, len(requests))
    engine.close()
    return [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Hypothesis)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(snapshot: Path, tmp_path: Path, name: str) -> None:
    """From disk to text, each family gives what CTranslate2 gives from the same files."""
    family = FAMILIES[name]
    vocabulary = tokenizer(snapshot, tmp_path / "model", family.vocabulary_size)
    assert vocabulary.size == family.vocabulary_size
    assert ("yue" in vocabulary.languages) == (family.vocabulary_size == 51_866)
    encoder_layers, decoder_layers = family.layers
    shape = replace(SHAPES["smoke"], n_mels=family.n_mels, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    written(talkative(vocabulary, shape), vocabulary, tmp_path / "model", family)
    engine = CudaEngine.load(tmp_path / "model", vocabulary, device="cpu", slots=2)
    found = read(engine, many=vocabulary.multilingual)
    stored = converted(tmp_path / "model", tmp_path / "work", "float32")
    other = Ct2Engine.load(stored, vocabulary, compute_type="float32", batch_size=1, workers=1, threads_per_worker=1)
    expected = read(other, many=vocabulary.multilingual)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert len({one.tokens for one in found}) == 2
    for one, theirs in zip(found, expected, strict=True):
        assert one.avg_logprob == pytest.approx(theirs.avg_logprob, abs=1e-3)
