"""The benchmark for GPUs works on a machine without one, and its roofline is the published arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.random_whisper import SHAPES
from benchmarks.roofline import H200, encoder_flops, window_s
from whisperd import audio
from whisperd.transcript import SAMPLE_RATE_HZ


@pytest.mark.parametrize(
    ("name", "batch", "n_tokens", "expected_s"),
    [
        ("large-v3", 128, 76, 1 / 126),
        ("large-v3", 1, 100, 0.0464),
        ("large-v3", 128, 100, 0.0095),
        ("large-v3-turbo", 128, 76, 1 / 283),
        ("distil-large-v3", 128, 100, 0.0033),
        ("small", 128, 100, 0.0019),
    ],
)
def test_roofline(name: str, batch: int, n_tokens: int, expected_s: float) -> None:
    """The floors of known models on an H200, as reckoned before by hand."""
    assert window_s(SHAPES[name], H200, batch=batch, n_tokens=n_tokens) == pytest.approx(expected_s, rel=0.03)


def test_encoder() -> None:
    """large-v3 multiplies 2.59 million million times for each window."""
    assert encoder_flops(SHAPES["large-v3"]) == pytest.approx(2.588e12, rel=0.01)


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, with a tiny model: both systems write the same lengths, and every line says what it is."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks import gpu

    gpu.main(["--smoke", "--daemon-s", "0"])
    printed = capsys.readouterr().out
    assert "RANDOM weights, FORCED lengths" in printed
    assert re.search(r"whisperd, short +[\d.]+ windows/s", printed)
    assert re.search(r"transformers, batch 24, short +[\d.]+ windows/s", printed)
    assert printed.count("p99") == 3
    assert "roofline" not in printed  # of a CPU nobody knows it


def test_recordings(tmp_path: Path) -> None:
    """The daemon is given the same speech as PCM and as mp3."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks import gpu

    for _, path, duration_s in gpu.recordings(tmp_path, 5.0):
        with path.open("rb") as file:
            n_samples = sum(map(len, audio.blocks(file)))
        assert n_samples / SAMPLE_RATE_HZ == pytest.approx(duration_s, abs=0.2)
