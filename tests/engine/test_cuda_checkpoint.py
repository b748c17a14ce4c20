"""What the engine for GPUs reads from disk and plans in memory; none of it needs torch or a GPU."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from benchmarks.random_whisper import SHAPES
from tests.support.hf_export import export
from whisperd.engine import checkpoints as checkpoint
from whisperd.engine.checkpoints import converted
from whisperd.engine.cuda import memory
from whisperd.engine.devices import fp8_obstacle, obstacle
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import EngineError, OutOfMemory, SourceError
from whisperd.speech.tokenizer import Vocabulary

NO_GPU = pytest.mark.skipif(obstacle() is None, reason="this machine has a GPU")


@pytest.mark.parametrize("shards", [1, 3])
def test_both_formats_are_one_model(snapshot: Path, tmp_path: Path, shards: int) -> None:
    """CTranslate2's file and safetensors, whole or in parts, give the same sizes, ids and tensors."""
    ours = checkpoint.read(snapshot)
    theirs = checkpoint.read(export(snapshot, tmp_path / "hf", shards=shards))
    assert ours.shape == theirs.shape
    assert (ours.shape.width, ours.shape.decoder_layers, ours.shape.n_mels) == (384, 4, 80)
    assert ours.alignment_heads == theirs.alignment_heads
    assert (ours.suppressed, ours.suppressed_first) == (theirs.suppressed, theirs.suppressed_first)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(np.array_equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.02), ("int16", 2e-3), ("float32", 1e-3)])
def test_stored_types(snapshot: Path, tmp_path: Path, quantization: str, tolerance: float) -> None:
    """Quantised conversions come back close to the weights that they were made from."""
    original = checkpoint.read(snapshot).tensors
    stored = converted(export(snapshot, tmp_path / "hf"), tmp_path / "work", quantization)
    for name, tensor in checkpoint.read(stored).tensors.items():
        expected = original[name].astype(np.float32)
        largest = np.abs(expected).max()
        assert np.abs(tensor.astype(np.float32) - expected).max() <= tolerance * largest


@pytest.mark.parametrize("quantization", ["int8", "float32"])
def test_equal_tensors_are_stored_once(snapshot: Path, tmp_path: Path, quantization: str) -> None:
    """CTranslate2 gives one of two equal variables only a second name; both are read."""
    twins = "model.encoder.layers.0.fc1.weight", "model.encoder.layers.1.fc1.weight"
    found = checkpoint.read(export(snapshot, tmp_path / "hf")).tensors
    whole = {name: np.array(tensor) for name, tensor in found.items()} | {twins[1]: np.array(found[twins[0]])}
    save_file(whole, tmp_path / "hf/model.safetensors")
    stored = converted(tmp_path / "hf", tmp_path / "work", quantization)
    one, other = (checkpoint.read(stored).tensors[name].astype(np.float32) for name in twins)
    assert np.array_equal(one, other)
    np.testing.assert_allclose(one, whole[twins[0]], atol=0.02 * np.abs(one).max())


def test_bfloat16(snapshot: Path, tmp_path: Path) -> None:
    """bfloat16 keeps eight bits of each weight."""
    original = checkpoint.read(snapshot).tensors
    for name, tensor in checkpoint.read(export(snapshot, tmp_path / "hf", bfloat16=True)).tensors.items():
        np.testing.assert_allclose(tensor, original[name].astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize("kept", [3, 100_000, 40_000_000])
def test_cut_off(snapshot: Path, tmp_path: Path, kept: int) -> None:
    """Half a model.bin is refused by name."""
    (tmp_path / "model.bin").write_bytes((snapshot / "model.bin").read_bytes()[:kept])
    with pytest.raises(SourceError, match=str(tmp_path)):
        checkpoint.read(tmp_path)


def test_no_model(tmp_path: Path) -> None:
    """A directory without weights is refused with the names of the files that were expected."""
    with pytest.raises(SourceError, match=r"model\.bin.*model\.safetensors"):
        checkpoint.read(tmp_path)


def test_sizes(snapshot: Path) -> None:
    """The computed sizes of weights and slots equal those of the tensors, and the known ones of large-v3."""
    found = checkpoint.read(snapshot)
    real_bytes = sum(tensor.size for tensor in found.tensors.values()) * 2
    assert memory.weight_bytes(found.shape, 2) == pytest.approx(real_bytes, rel=0.01)
    large = SHAPES["large-v3"]
    assert memory.weight_bytes(large, 2) == pytest.approx(3.08e9, rel=0.02)
    audio_bytes, text_bytes = 245.8e6, 448 * 164e3
    assert memory.slot_bytes(large, 2) == pytest.approx(audio_bytes + text_bytes, rel=0.01)


@given(
    name=st.sampled_from(sorted(SHAPES)), budget_bytes=st.integers(0, 200 * 10**9), item_bytes=st.sampled_from([2, 4])
)
def test_slots_fit_the_budget(name: str, budget_bytes: int, item_bytes: int) -> None:
    """Weights, workspace and slots stay below the budget, more memory never gives fewer slots, and none is an error."""
    shape = SHAPES[name]
    parts = (memory.weight_bytes, memory.workspace_bytes, memory.padding_bytes)
    fixed = sum(part(shape, item_bytes) for part in parts)
    if fixed + memory.slot_bytes(shape, item_bytes) > (1 - memory.SPARE) * budget_bytes:
        with pytest.raises(OutOfMemory, match="GB"):
            memory.slots(shape, item_bytes, budget_bytes)
        return
    slots = memory.slots(shape, item_bytes, budget_bytes)
    assert 1 <= slots <= memory.SLOTS_MAX
    kept_bytes = memory.kept(slots) * memory.audio_bytes(shape, item_bytes)
    assert fixed + slots * memory.slot_bytes(shape, item_bytes) + kept_bytes <= budget_bytes
    assert memory.slots(shape, item_bytes, budget_bytes + 10**9) >= slots


def test_small_cards_hold_large_models() -> None:
    """8 GB are enough for large-v3 in half precision, and 2 GB are not."""
    assert memory.slots(SHAPES["large-v3"], 2, 8 * 10**9) >= 8
    assert memory.slots(SHAPES["large-v3-turbo"], 2, 8 * 10**9) >= 64
    with pytest.raises(OutOfMemory, match=r"needs 5\.\d GB"):
        memory.slots(SHAPES["large-v3"], 2, 2 * 10**9)


@given(name=st.sampled_from(sorted(SHAPES)), budget_bytes=st.integers(8 * 10**9, 80 * 10**9))
def test_eight_bits_hold_more(name: str, budget_bytes: int) -> None:
    """Audio in 8 bits takes half of its room, so more windows fit, and they still fit the budget."""
    shape = SHAPES[name]
    found = memory.slots(shape, 2, budget_bytes, audio_item_bytes=1, most=10**9)
    assert found > memory.slots(shape, 2, budget_bytes, most=10**9)
    fixed = sum(part(shape, 2) for part in (memory.weight_bytes, memory.workspace_bytes, memory.padding_bytes))
    kept_bytes = memory.kept(found) * memory.audio_bytes(shape, 1)
    assert memory.audio_bytes(shape, 2) == 2 * memory.audio_bytes(shape, 1)
    assert fixed + found * memory.slot_bytes(shape, 2, 1) + kept_bytes <= budget_bytes


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((8, 9), False, None),
        ((9, 0), False, None),
        ((12, 0), False, None),
        ((8, 6), False, "8.6"),
        ((9, 4), True, "AMD"),
    ],
)
def test_cards_with_eight_bits(capability: tuple[int, int], hip: bool, expected: str | None) -> None:
    """Ada, Hopper and later GPUs are accepted; for others the error says what they have and what is needed."""
    found = fp8_obstacle(capability, hip=hip)
    assert found is None if expected is None else expected in (found or "")


def test_no_device() -> None:
    """Without a device of any maker, nothing else is checked."""
    assert "no GPU" in (obstacle(nodes=()) or "")


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device but without PyTorch, the error says what to install."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "whisperd[cuda]" in (obstacle(nodes=("/dev/null",)) or "")


@NO_GPU
def test_torch_without_a_gpu() -> None:
    """With a device that PyTorch cannot use, the error names the build of PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    assert torch.__version__ in (obstacle(nodes=("/dev/null",)) or "")


@NO_GPU
def test_cuda_without_a_gpu(snapshot: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """A requested device that is missing is an error with the reason, never a silent fallback."""
    with pytest.raises(EngineError, match=r"'cuda', but .*GPU.*'auto' and 'cpu'"):
        open_engine(snapshot, vocabulary, EngineSettings(device="cuda"), tmp_path)


@NO_GPU
def test_auto_says_why(
    snapshot: Path, vocabulary: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``auto`` without a GPU takes the CPU and says why."""
    with caplog.at_level(logging.INFO, logger="whisperd.engine"):
        engine = open_engine(snapshot, vocabulary, EngineSettings(), tmp_path)
    engine.close()
    assert engine.info.engine.startswith("ctranslate2")
    assert "takes the cpu" in caplog.text
    assert "no GPU" in caplog.text
