"""CTranslate2 on real weights reads real speech."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_contract import decode
from tests.speech import Clip, plain
from whisperd.engine import EngineSettings, open_engine
from whisperd.engine.base import DecodeRequest
from whisperd.errors import SourceError
from whisperd.tokens import Vocabulary


def test_real_speech(snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip], tmp_path: Path) -> None:
    """The embedded model reads a prompt word by word, with times."""
    engine = open_engine(snapshot, vocabulary, EngineSettings(), tmp_path)
    try:
        found = decode(engine, clips["monkeys"].samples(), DecodeRequest())
    finally:
        engine.close()
    assert plain(vocabulary.decode(found.tokens)) == plain(clips["monkeys"].text)
    assert found.avg_logprob > -0.5
    assert found.no_speech_prob < 0.3


def test_no_model_in_the_directory(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """A directory without weights is refused with the names of the files that were expected."""
    with pytest.raises(SourceError, match=r"model\.bin.*model\.safetensors"):
        open_engine(tmp_path, vocabulary, EngineSettings(), tmp_path)


def test_damaged_weights(snapshot: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """A cut off model.bin is a SourceError that names the directory."""
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (tmp_path / name).write_bytes((snapshot / name).read_bytes())
    (tmp_path / "model.bin").write_bytes((snapshot / "model.bin").read_bytes()[:100_000])
    with pytest.raises(SourceError, match=str(tmp_path)):
        open_engine(tmp_path, vocabulary, EngineSettings(), tmp_path)


@pytest.mark.parametrize(("n_cores", "expected"), [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (8, (2, 4)), (32, (8, 4))])
def test_placement(n_cores: int, expected: tuple[int, int]) -> None:
    """Two batches are in flight where there are two cores; threads are no more than cores, and four for a worker."""
    assert EngineSettings().placed(n_cores) == expected
