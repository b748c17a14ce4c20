"""The benchmark for GPUs works on a machine without one, and its roofline is the published formula."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_whisper import SHAPES, drawn, written
from benchmarks.recordings import FORMS, recordings
from benchmarks.roofline import H200, encoder_flops, window_s
from whisperd.engine.base import DecodeRequest, Hypothesis, Window
from whisperd.speech import audio
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ

# what the reference machine for GPUs lacks
WITHOUT = """
import sys
for name in ("av", "ctranslate2"):
    sys.modules[name] = None
from benchmarks.gpu.command import main
main(["--smoke", "--parts", "engine,daemon", "--snapshot", sys.argv[1]])
"""


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
    """The floors of known models on an H200 equal those computed by hand."""
    assert window_s(SHAPES[name], H200, batch=batch, n_tokens=n_tokens) == pytest.approx(expected_s, rel=0.03)


def test_encoder() -> None:
    """large-v3 multiplies 2.59 million million times for each window."""
    assert encoder_flops(SHAPES["large-v3"]) == pytest.approx(2.588e12, rel=0.01)


def test_smoke(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the CPU, with a tiny model, all systems write the same lengths, and every line is labelled."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.gpu.command import main

    main(["--smoke", "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "RANDOM weights, FORCED lengths" in printed
    assert re.search(r"whisperd, short +[\d.]+ windows/s", printed)
    assert "roofline" not in printed  # not known for a CPU
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["device"], found["weights"], found["lengths"]) == ("cpu", "random", "forced")
    records = found["records"]
    assert {one["kind"] for one in records} >= {
        "encoder", "attention", "step", "mel", "vad", "start", "throughput", "latency", "memory", "daemon"
    }  # fmt: skip
    systems = {one["system"] for one in records if one["kind"] == "throughput"}
    assert systems >= {
        "whisperd",
        "transformers, batch 4",
        "transformers, static cache, batch 4",
        "ctranslate2, batch 4",
    }
    assert sum(one["kind"] == "latency" for one in records) == 7
    for one in records:
        figures = [value for key, value in one.items() if key.endswith(("_s", "_ms", "_us", "rtfx", "_hour"))]
        assert all(value is None or value >= 0 for value in figures), one


def test_without_the_libraries_of_the_daemon(snapshot: Path) -> None:
    """Where PyAV and CTranslate2 are missing, the engine is measured and the rest reports what is missing."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(snapshot)], check=True, capture_output=True, text=True, timeout=240
    )
    assert re.search(r"whisperd, short +[\d.]+ windows/s", done.stdout)
    assert "daemon: not measured without av" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["records"]


@pytest.mark.parametrize("n_tokens", [8, 40])
def test_texts_that_end(snapshot: Path, vocabulary: Vocabulary, tmp_path: Path, n_tokens: int) -> None:
    """The model for daemons writes so many tokens in any window, the first and the last of them timestamps."""
    pytest.importorskip("torch", reason="PyTorch is not installed").set_num_threads(1)
    from whisperd.engine.cuda.engine import CudaEngine

    path = written(drawn(SHAPES["smoke"]), snapshot, tmp_path / "model", n_tokens=n_tokens)
    engine = CudaEngine.load(path, vocabulary, device="cpu", slots=2)
    noise = np.random.default_rng(0).standard_normal(16_000 * 20).astype(np.float32) * 0.1
    request = DecodeRequest(language="en")
    engine.admit([Window(id=key, samples=noise[: 16_000 * key], request=request) for key in (1, 20)])
    outcomes = [outcome for _ in range(30) for outcome in engine.step()]
    engine.close()
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert isinstance(outcome, Hypothesis)
        is_timestamp = [token >= vocabulary.timestamp_begin for token in outcome.tokens]
        assert is_timestamp == [True, *[False] * (n_tokens - 2), True]


@pytest.mark.parametrize("form", FORMS)
def test_recordings(form: str, tmp_path: Path) -> None:
    """Every form holds the same speech, with its stated length."""
    for _, path, duration_s in recordings(tmp_path, 5.0, [form]):
        with path.open("rb") as file:
            n_samples = sum(map(len, audio.blocks(file)))
        assert n_samples / SAMPLE_RATE_HZ == pytest.approx(duration_s, abs=0.2)


def test_host(capsys: pytest.CaptureFixture[str]) -> None:
    """The host's part of a request is measured in all three parts."""
    from benchmarks.host import main

    main(["--smoke"])
    printed = capsys.readouterr().out
    for part in ("decode", "request", "request, vad"):
        assert len(re.findall(rf"mp3 +{part} +[12] threads +\d+x per core", printed)) == 2
