"""The encoders: CTranslate2, or OpenVINO from the same tensors."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest

from tests.engine.test_contract import Halvings, decode, drain
from tests.support.hf_export import export
from tests.support.speech import Clip, plain
from whisperd.engine.base import DecodeRequest, Hypothesis, Window
from whisperd.engine.cpu.encoder import Encode, ctranslate2_encoder
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import EngineError
from whisperd.speech.features import LogMel
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import Floats

EXACT = 2e-3  # of states of up to 14; float32 sums in another order
ROUNDED = 0.06  # root mean square in bfloat16; CTranslate2's int8 has 0.07


def exact_encoder(snapshot: Path) -> Encode:
    return ctranslate2_encoder(ctranslate2.models.Whisper(str(snapshot), device="cpu", compute_type="float32"))


def openvino_encoder(path: Path, compute_type: str) -> Any:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from whisperd.engine.cpu.openvino import OpenVinoEncoder

    return OpenVinoEncoder.load(path, compute_type=compute_type, streams=1, threads_per_stream=1)


@pytest.fixture(scope="module")
def features(clips: dict[str, Clip]) -> Floats:
    return LogMel(80)(clips["monkeys"].samples())


@pytest.mark.parametrize("frames", [200, 500, 3000])
def test_openvino_is_the_same_encoder(snapshot: Path, features: Floats, frames: int) -> None:
    """In float32 its states are those of CTranslate2, for windows of any length, one call after another."""
    encode = openvino_encoder(snapshot, "float32")
    assert encode.precision == "float32"
    first = encode(features[:, :frames])
    kept = first.copy()
    assert first.shape == (1, frames // 2, 384)
    np.testing.assert_allclose(first, exact_encoder(snapshot)(features[:, :frames]), atol=EXACT)
    encode(np.zeros_like(features[:, :frames]))
    assert (first == kept).all(), "a later window must not write into an earlier one's states"


def test_openvino_in_the_fastest_type(snapshot: Path, features: Floats) -> None:
    """Where the CPU computes in bfloat16 the states lose less precision than in CTranslate2's int8."""
    error = openvino_encoder(snapshot, "int8")(features) - exact_encoder(snapshot)(features)
    assert np.sqrt((error**2).mean()) < ROUNDED


def test_openvino_reads_safetensors(snapshot: Path, features: Floats, tmp_path: Path) -> None:
    """A Hugging Face snapshot gives the same encoder as CTranslate2's file."""
    ours = openvino_encoder(snapshot, "float32")(features[:, :300])
    theirs = openvino_encoder(export(snapshot, tmp_path / "hf"), "float32")(features[:, :300])
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("encoder", ["ctranslate2", "openvino"])
def test_both_read_speech(
    encoder: Any, snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip], tmp_path: Path
) -> None:
    """The decoder works on the states of either encoder, and reports which one it was."""
    if encoder == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    engine = open_engine(snapshot, vocabulary, EngineSettings(encoder=encoder, short_windows="never"), tmp_path)
    try:
        found = decode(engine, clips["monkeys"].samples(), DecodeRequest())
        assert encoder in engine.info.engine
    finally:
        engine.close()
    assert plain(vocabulary.decode(found.tokens)) == plain(clips["monkeys"].text)


def test_without_openvino(
    snapshot: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing OpenVINO that was asked for is an error that says what to install; else CTranslate2 encodes."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"pip install 'whisperd\[openvino\]'"):
        open_engine(snapshot, vocabulary, EngineSettings(encoder="openvino"), tmp_path)
    engine = open_engine(snapshot, vocabulary, EngineSettings(), tmp_path)
    engine.close()
    assert engine.info.engine == "ctranslate2"


def test_openvino_that_does_not_work(
    snapshot: Path,
    vocabulary: Vocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a CPU that OpenVINO cannot compile for, "auto" warns and uses CTranslate2, and "openvino" is an error."""

    class Core:
        def get_property(self, *_: str) -> list[str]:
            raise RuntimeError("no such plugin")

    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setattr(sys.modules["openvino"], "Core", Core)
    with pytest.raises(EngineError, match="no such plugin"):
        open_engine(snapshot, vocabulary, EngineSettings(encoder="openvino"), tmp_path)
    with caplog.at_level(logging.WARNING):
        engine = open_engine(snapshot, vocabulary, EngineSettings(), tmp_path)
    engine.close()
    assert engine.info.engine == "ctranslate2"
    assert "CTranslate2 encodes instead" in caplog.text


def test_no_memory_while_encoding(snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip]) -> None:
    """Windows that could not be encoded are encoded again in a smaller batch: each comes out right."""
    model = ctranslate2.models.Whisper(str(snapshot), device="cpu", compute_type="float32")
    encode, calls = ctranslate2_encoder(model), iter(range(100))

    def cramped(features: Floats) -> Floats:
        if next(calls) in {2, 3}:
            raise MemoryError("std::bad_alloc")
        return encode(features)

    meter = Halvings()
    engine = Ct2Engine(model, vocabulary, batch_size=4, workers=1, encode=cramped, meter=meter)
    try:
        engine.admit([Window(id=key, samples=clips["agent"].samples(), request=DecodeRequest()) for key in range(4)])
        found = drain(engine, 4).values()
    finally:
        engine.close()
    assert all(isinstance(one, Hypothesis) for one in found)
    assert len({one.tokens for one in found if isinstance(one, Hypothesis)}) == 1
    assert meter.count == 1


def test_no_telemetry(tmp_path: Path, snapshot: Path) -> None:
    """OpenVINO's telemetry is not loaded, and nothing is written to the home directory."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    script = (
        "import sys; from pathlib import Path; from whisperd.engine.cpu.openvino import OpenVinoEncoder; "
        f"OpenVinoEncoder.load(Path({str(snapshot)!r}), compute_type='int8', streams=1, threads_per_stream=1); "
        "assert not [name for name in sys.modules if 'telemetry' in name or 'ovc' in name]"
    )
    environ = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", script], env=environ, check=True)
    assert list(tmp_path.iterdir()) == []
