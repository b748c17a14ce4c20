"""Hugging Face checkpoints are served like CTranslate2 models, without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.engine.test_contract import decode
from tests.support.hf_export import export
from tests.support.speech import Clip, plain
from whisperd.engine.base import DecodeRequest, Hypothesis
from whisperd.engine.checkpoints import converted
from whisperd.engine.checkpoints.safetensors import is_ctranslate2, is_huggingface, weight_files
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import SourceError
from whisperd.speech.tokenizer import Vocabulary


def read(snapshot: Path, work_dir: Path, clip: Clip, compute_type: str) -> Hypothesis:
    """Decodes a clip with whatever is in ``snapshot``."""
    engine = open_engine(snapshot, Vocabulary.load(snapshot), EngineSettings(compute_type=compute_type), work_dir)
    try:
        return decode(engine, clip.samples(), DecodeRequest(word_timestamps=True))
    finally:
        engine.close()


@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back(
    snapshot: Path, clips: dict[str, Clip], tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted without torch, exported weights give the same tokens, scores and word times as the original."""
    monkeypatch.setitem(sys.modules, "torch", None)
    exported = export(snapshot, tmp_path / "hf", shards=shards)
    assert is_huggingface(exported)
    assert not is_ctranslate2(exported)
    original = read(snapshot, tmp_path, clips["agent"], "float32")
    again = read(exported, tmp_path / "work", clips["agent"], "float32")
    assert again.tokens == original.tokens
    assert again.avg_logprob == pytest.approx(original.avg_logprob, abs=1e-5)
    assert again.alignment == original.alignment


def test_int8(snapshot: Path, clips: dict[str, Clip], tmp_path: Path) -> None:
    """The quantised conversion that the CPU uses by default gives the tokens of the original at the same type."""
    exported = export(snapshot, tmp_path / "hf")
    expected = read(snapshot, tmp_path, clips["agent"], "auto")
    assert read(exported, tmp_path / "work", clips["agent"], "auto").tokens == expected.tokens


def test_bfloat16(snapshot: Path, clips: dict[str, Clip], tmp_path: Path) -> None:
    """A bfloat16 checkpoint is read although numpy lacks the type."""
    exported = export(snapshot, tmp_path / "hf", bfloat16=True)
    found = read(exported, tmp_path / "work", clips["monkeys"], "float32")
    assert plain(Vocabulary.load(exported).decode(found.tokens)) == plain(clips["monkeys"].text)


def test_kept(snapshot: Path, tmp_path: Path) -> None:
    """A conversion is made once for each commit and type, and leaves only its result."""
    commit = tmp_path / "models--openai--whisper-tiny.en" / "snapshots" / ("c" * 40)
    export(snapshot, commit)
    work = tmp_path / "work"
    first = converted(commit, work, "int8")
    made_ns = (first / "model.bin").stat().st_mtime_ns
    assert first.name == f"models--openai--whisper-tiny.en--{'c' * 40}--int8"
    assert converted(commit, work, "int8") == first
    assert (first / "model.bin").stat().st_mtime_ns == made_ns
    assert converted(commit, work, "float32") != first
    assert len(list(work.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "shape", "other model", "no layers"])
def test_damaged(snapshot: Path, tmp_path: Path, damage: str) -> None:
    """An incomplete Whisper checkpoint is refused by name, and no partial conversion remains."""
    exported = export(snapshot, tmp_path / "hf")
    weights, config = exported / "model.safetensors", exported / "config.json"
    known = json.loads(config.read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1_000_000])
    elif damage == "shape":
        config.write_text(json.dumps(known | {"decoder_layers": 9}))
    elif damage == "other model":
        config.write_text(json.dumps(known | {"model_type": "wav2vec2"}))
    else:
        config.write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(SourceError, match=str(exported)):
        converted(exported, tmp_path / "work", "int8")
    assert list((tmp_path / "work").iterdir()) == []


def test_the_format_of_a_directory_is_that_of_its_content(tmp_path: Path) -> None:
    """A model.bin beside safetensors is CTranslate2's unless PyTorch wrote it; the index names the shards."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "odd.safetensors").touch()
    (tmp_path / "model-00001-of-00009.safetensors").touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "odd.safetensors", "b": "odd.safetensors"}}')
    assert weight_files(tmp_path) == [tmp_path / "odd.safetensors"]
    for head, expected in ((b"PK\x03\x04", False), (b"\x80\x02}q", False), (b"\x06\0\0\0", True)):
        (tmp_path / "model.bin").write_bytes(head)
        assert is_ctranslate2(tmp_path) is expected
    for text in ("{}", '{"weight_map": {"a": "../evil"}}', '{"weight_map": [1]}'):
        index.write_text(text)
        with pytest.raises(SourceError, match="no index of weights"):
            weight_files(tmp_path)
