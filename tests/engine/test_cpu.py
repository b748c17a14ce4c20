"""CTranslate2 on real weights reads real speech."""

from __future__ import annotations

import threading
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine.test_contract import decode, drain
from tests.support.speech import Clip, plain
from whisperd.engine.base import DecodeRequest, Window
from whisperd.engine.cpu.encoder import ctranslate2_encoder
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import SourceError
from whisperd.speech.tokenizer import Vocabulary


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


def test_a_short_request_cuts_in(snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip]) -> None:
    """The only worker encodes two windows of a long request and decodes a short one that arrives meanwhile first."""
    model = ctranslate2.models.Whisper(str(snapshot), device="cpu", compute_type="int8")
    encoding, go_on = threading.Event(), threading.Event()
    encode = ctranslate2_encoder(model)

    def slow(features: NDArray[np.float32]) -> NDArray[np.float32]:
        encoding.set()
        assert go_on.wait(60)
        return encode(features)

    engine = Ct2Engine(model, vocabulary, batch_size=2, workers=1, encode=slow)
    samples = clips["monkeys"].samples()
    try:
        engine.admit([Window(id=key, samples=samples, request=DecodeRequest(), lane="bulk") for key in (1, 2)])
        assert encoding.wait(60)
        assert engine.free_slots == engine.info.spare_slots == 2
        engine.admit([Window(id=3, samples=samples, request=DecodeRequest())])
        go_on.set()
        assert list(drain(engine, 3)) == [3, 1, 2]
    finally:
        engine.close()
