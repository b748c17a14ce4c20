"""Every kernel compiles for current GPUs without one of them, and none spills variables to memory."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu.compiled import ARCHITECTURES, Variant, usage, variants

REGISTERS_MAX = {"attend_one": 64, "attend_several": 128, "put_states": 64, "choose_token": 128, "dtw": 64}
SHARED_BYTES_MAX = 48 * 1024  # what every GPU provides without an opt-in
WHERE = [
    (variant, architecture)
    for variant in variants()
    for architecture in ARCHITECTURES
    # the types differ in how they are loaded: one of them is compiled for every GPU, the others for one
    if architecture >= variant.oldest and (architecture == 90 or "fp16" in variant.name)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, set to avoid a warning that it will change


@pytest.mark.parametrize(("variant", "architecture"), WHERE, ids=[f"{one.name} sm_{sm}" for one, sm in WHERE])
def test_fits(variant: Variant, architecture: int) -> None:
    """No kernel spills registers, and each uses few enough for several programs on a multiprocessor."""
    found = usage(variant, architecture)
    assert found.stack_bytes == 0
    assert found.registers <= REGISTERS_MAX[variant.name.split()[0]]
    assert found.shared_bytes <= SHARED_BYTES_MAX
