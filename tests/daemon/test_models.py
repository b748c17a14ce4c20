"""Several models: loaded when requested, unloaded when idle, loaded again when their engine failed."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import openers
from tests.support.fakes import FakeEngine, written
from tests.support.models import NAMES, House, ScriptedOpener
from tests.support.speech import silence
from whisperd.config import ModelTable
from whisperd.daemon.memory import Leftovers, trim, weights_bytes
from whisperd.daemon.models import ServedModel, ServedModels
from whisperd.daemon.open_model import ModelOpener, load, smaller
from whisperd.engine.base import DecodeRequest, Engine, Hypothesis, Window
from whisperd.engine.factory import EngineSettings
from whisperd.engine.process import ChildEngine
from whisperd.errors import Cancelled, EngineError, ModelLoading, ModelNotFound, OutOfMemory, SourceError
from whisperd.metrics import ModelMeter, Stage
from whisperd.metrics.prometheus import Metrics
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechDetector


@pytest.fixture
def house(tmp_path: Path, snapshot: Path) -> Iterator[House]:
    opener = ModelOpener(EngineSettings(workers=1, threads_per_worker=2), tmp_path, Metrics())
    found = House(tmp_path, snapshot, opener)
    yield found
    found.close()


def room_for(house: House, n_models: float) -> int:
    return int(n_models * weights_bytes(house.snapshots["a"]))


def test_the_least_recently_used_one_makes_room(house: House) -> None:
    """With room for two of three, the least recently used model is unloaded; a small budget still loads the first."""
    house.switch(*NAMES, preload=False, memory_bytes=room_for(house, 2.6))
    assert house.loaded == {"a"}
    house.use("b")
    house.use("a")
    assert house.loaded == {"a", "b"}
    house.use("c")
    assert house.loaded == {"a", "c"}
    house.use("b")
    assert house.loaded == {"b", "c"}


def test_a_kept_model_stays(house: House) -> None:
    """keep_loaded protects a model from eviction and from idle unloading."""
    house.switch(*NAMES, preload=False, memory_bytes=room_for(house, 2.6), keep="a")
    house.use("b")
    house.use("c")
    assert house.loaded == {"a", "c"}
    house.now_s += 100
    assert house.unload_idle(60) == ("c",)
    assert house.loaded == {"a"}


def test_a_model_in_use_is_not_evicted(house: House) -> None:
    """While all room is in use, a request for another model gets the reason and the time after which to retry."""
    house.switch(*NAMES, preload=False, memory_bytes=room_for(house, 1.2))
    with house.leases.lease("a"):
        with pytest.raises(ModelLoading, match=r"in use hold .* MB \(limits\.model_bytes\)") as caught:
            house.load_one("b")
        assert caught.value.retry_after_s > 0
        house.now_s += 100
        assert house.unload_idle(60) == ()
    house.use("b")
    assert house.loaded == {"b"}


def test_preload_within_the_budget(house: House) -> None:
    """A model that does not fit at boot is loaded by its first request."""
    house.switch(*NAMES, memory_bytes=room_for(house, 2.2))
    assert house.loaded == {"a", "b"}


def test_idle_models_leave_and_come_back(house: House) -> None:
    """Only a model that was idle for long enough is unloaded, and the next request loads it again."""
    house.switch(*NAMES)
    house.now_s += 50
    house.use("b")
    house.now_s += 30
    assert set(house.unload_idle(60)) == {"a", "c"}
    assert house.loaded == {"b"}
    house.use("a")
    assert house.unload_idle(60) == ()


def test_a_failed_engine_is_replaced(
    tmp_path: Path, snapshot: Path, vocabulary: Vocabulary, detector: SpeechDetector
) -> None:
    """The next request loads the model again."""

    def fails(_: Window) -> Hypothesis:
        raise EngineError("the device fell off the bus")

    opener = ScriptedOpener(vocabulary, detector, [fails, lambda window: written(vocabulary, window, " hello")])
    house = House(tmp_path, snapshot, opener)
    house.switch("a")
    failed = house.model("a").batcher
    ticket = failed.ticket()
    ticket.submit(silence(1.0), DecodeRequest())
    ticket.collect()
    assert "fell off the bus" in str(failed.failure)
    house.use("a")
    replaced = house.model("a").batcher
    assert replaced is not failed
    assert replaced.failure is None
    house.close()


def test_a_model_that_cannot_be_loaded(house: House) -> None:
    """The first request gets the reason; the next ones get it without a new attempt for a while."""
    house.switch(*NAMES, preload=False)
    (house.snapshots["b"] / "model.bin").unlink()
    (house.snapshots["b"] / "model.bin").write_bytes(b"damaged")
    with pytest.raises(SourceError, match=str(house.snapshots["b"])) as first:
        house.load_one("b")
    with pytest.raises(ModelLoading, match=re.escape(f"a moment ago: {first.value}")) as caught:
        house.load_one("b")
    assert 0 < caught.value.retry_after_s <= 10
    assert house.loaded == {"a"}


class Halvings(ModelMeter):
    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def count_halving(self, stage: Stage) -> None:
        self.stages.append(stage)


@pytest.mark.parametrize("where", ["open", "first inference"])
def test_no_room_for_the_batch(snapshot: Path, tmp_path: Path, detector: SpeechDetector, where: str) -> None:
    """A device too small for the batch gets a smaller one; a device too small for any batch is an error."""
    opened: list[FakeEngine] = []

    def opener(_: Path, vocabulary: Vocabulary, settings: EngineSettings, __: Path, meter: ModelMeter) -> Engine:
        fits = settings.batch_size <= room
        if where == "open" and not fits:
            raise OutOfMemory("no room for the model")
        opened.append(FakeEngine(vocabulary, slots=settings.batch_size, room=None if fits else 0, meter=meter))
        return opened[-1]

    meter, settings = Halvings(), EngineSettings(batch_size=8, workers=2)
    room = 2
    model = load("x", snapshot, settings, tmp_path, detector, meter, opener)
    assert (model.batcher.info.slots, meter.stages) == (2, ["load", "load"])
    model.batcher.close()
    room = 0
    with pytest.raises(OutOfMemory):
        load("x", snapshot, settings, tmp_path, detector, Halvings(), opener)
    assert all(engine.closed for engine in opened)


def test_openais_names_mean_the_default_model() -> None:
    """OpenAI's names mean the default model unless one is declared; for other names the error lists the models."""
    tables = (
        ModelTable(repo="path:/mine", name="mine"),
        ModelTable(repo="path:/other", name="other", aliases=("gpt-4o-transcribe",)),
    )
    served = ServedModels(tuple(ServedModel(table=table) for table in tables))
    for name in ("whisper-1", "gpt-transcribe", "gpt-4o-mini-transcribe", "gpt-4o-mini-transcribe-2025-12-15", None):
        assert served.resolve(name) == "mine"
    assert served.resolve("gpt-4o-transcribe") == "other"
    with pytest.raises(ModelNotFound, match="this daemon has: mine, other, gpt-4o-transcribe"):
        served.resolve("gpt-5")


def test_no_room_in_a_process_of_its_own(snapshot: Path, tmp_path: Path, detector: SpeechDetector) -> None:
    """When memory runs out in an engine's process, the daemon halves the batch and counts it."""

    def opener(path: Path, _: Vocabulary, settings: EngineSettings, __: Path, meter: ModelMeter) -> Engine:
        there = partial(openers.ct2_in_little_room, path, settings.batch_size, 2)
        return ChildEngine(there, stall_timeout_s=60, meter=meter)

    meter = Halvings()
    model = load("x", snapshot, EngineSettings(batch_size=8), tmp_path, detector, meter, opener)
    try:
        info = model.batcher.info
        assert (info.slots - info.spare_slots, meter.stages) == (2, ["load", "load"])
        assert model.batcher.health.pid is not None
    finally:
        model.batcher.close()


def test_smaller() -> None:
    """The batch is reduced first, then the number of workers."""
    assert smaller(EngineSettings(batch_size=5, workers=3)) == EngineSettings(batch_size=2, workers=3)
    assert smaller(EngineSettings(batch_size=1, workers=3)) == EngineSettings(batch_size=1, workers=1)


def test_memory_is_given_back_when_idle() -> None:
    """Memory is trimmed once after each period of requests, and never while a request is active."""
    leftovers = Leftovers()
    assert not leftovers.due(n_served=0, n_active=0)
    assert not leftovers.due(n_served=3, n_active=1)
    assert leftovers.due(n_served=3, n_active=0)
    assert not leftovers.due(n_served=3, n_active=0)
    assert leftovers.due(n_served=4, n_active=0)


def test_trimming_collects_what_cancelled_requests_leave() -> None:
    """An error and its frames form a cycle that holds the samples; a trim frees it."""

    class Audio:
        """Stands for the samples of a request."""

    def cancel() -> None:
        raise Cancelled("the client went away")

    def run() -> weakref.ref[Audio]:
        audio = Audio()
        try:
            cancel()
        except Cancelled as error:
            kept = error  # the frame holds the error, the error's traceback holds the frame
        assert kept.__traceback__ is not None
        return weakref.ref(audio)

    gc.disable()
    try:
        left = run()
        assert left() is not None
        trim()
    finally:
        gc.enable()
    assert left() is None


def test_trimming_gives_memory_back() -> None:
    """Freed memory below an allocation that remains is returned to the system."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytes(100_000) for _ in range(1000)]  # each below the size that glibc maps by itself
    last = bytes(100_000)
    del blocks
    before_bytes = resident_bytes()
    trim()
    assert before_bytes - resident_bytes() > 50_000_000
    assert len(last) == 100_000
