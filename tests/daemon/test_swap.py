"""A reload whose new model does not fit beside the old one: the old one goes first, or comes back."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon.test_models import linked
from tests.support.fakes import FakeEngine
from tests.support.speech import Clip, plain, silence
from whisperd.config import Config, ModelTable
from whisperd.daemon.loader import Loader
from whisperd.daemon.open_model import Opener
from whisperd.daemon.queueing import LoaderQueue
from whisperd.daemon.registry import Registry
from whisperd.engine.base import DecodeRequest, Engine, EngineInfo, Hypothesis
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import ModelLoading, OutOfMemory
from whisperd.metrics import ModelMeter
from whisperd.metrics.prometheus import Metrics
from whisperd.speech.tokenizer import Vocabulary

PATIENCE_S = 60.0


class Memory:
    """Room for so many units; a model takes as many as ``sizes`` says, and half with the smallest batch."""

    def __init__(self, room: int, sizes: Mapping[str, int], *, real: bool = False, device: str = "cpu") -> None:
        self.room = room
        self.sizes = sizes
        self.real = real
        self.device = device
        self.used: dict[int, int] = {}
        self.opened: list[str] = []

    def open(
        self, snapshot: Path, vocabulary: Vocabulary, settings: EngineSettings, work_dir: Path, meter: ModelMeter
    ) -> Engine:
        need = self.sizes[snapshot.name] // (2 if settings.batch_size == 1 else 1)
        if sum(self.used.values()) + need > self.room:
            raise OutOfMemory(f"{snapshot.name} needs {need}, used are {self.used}")
        engine = open_engine(snapshot, vocabulary, settings, work_dir, meter) if self.real else self.fake(vocabulary)
        self.used[id(engine)] = need
        self.opened.append(snapshot.name)
        really_close = engine.close

        def close() -> None:
            really_close()
            self.used.pop(id(engine), None)

        engine.close = close  # type: ignore[method-assign]
        return engine

    def fake(self, vocabulary: Vocabulary) -> Engine:
        engine = FakeEngine(vocabulary)
        engine.info = EngineInfo(
            engine="fake", device=self.device, compute_type="float32", multilingual=False, languages=("en",), slots=4
        )
        return engine


class House:
    """A loader on a memory, with links to the embedded model under three names."""

    def __init__(self, directory: Path, snapshot: Path, opener: Opener, *, drain_s: float, own: bool) -> None:
        settings = EngineSettings(workers=1, batch_size=2, threads_per_worker=2, own_process=own)
        self.registry = Registry()
        self.loader = Loader(self.registry, settings, directory, Metrics(), opener=opener, drain_s=drain_s)
        self.snapshots = {name: linked(snapshot, directory / name) for name in ("a", "b", "c")}

    def switch(self, *names: str) -> None:
        models = tuple(ModelTable(repo=f"path:{self.snapshots[name]}", name=name) for name in names)
        self.loader.switch(Config(models=models), {name: self.snapshots[name] for name in names})

    @property
    def loaded(self) -> set[str]:
        return set(self.registry.served.models)


Builder = Callable[..., House]


@pytest.fixture
def house(tmp_path: Path, snapshot: Path) -> Iterator[Builder]:
    houses: list[House] = []

    def build(memory: Memory, *, drain_s: float = PATIENCE_S, own: bool = False) -> House:
        houses.append(House(tmp_path, snapshot, memory.open, drain_s=drain_s, own=own))
        return houses[-1]

    yield build
    for one in houses:
        one.registry.close()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not become true"
        os.sched_yield()


def test_beside_where_there_is_room(house: Builder) -> None:
    """The old model leaves only when the new one is there."""
    memory = Memory(2, {"a": 1, "b": 1})
    one = house(memory)
    one.switch("a")
    with one.registry.lease("a") as held:
        one.switch("b")
        assert one.loaded == {"b"}
        assert held.batcher.failure is None
    until(lambda: sum(memory.used.values()) == 1)


def test_the_old_one_goes_first(house: Builder) -> None:
    """Without room for both, the reload waits for the last request of the old model; new requests wait meanwhile."""
    memory = Memory(3, {"a": 2, "b": 2})
    one = house(memory)
    one.switch("a")
    with ThreadPoolExecutor(2) as pool:
        with one.registry.lease("a") as held:
            switching = pool.submit(one.switch, "b")
            until(lambda: not one.loaded)
            waiting = pool.submit(one.loader.load_one, "a")
            assert not switching.done()
            assert not waiting.done()
            assert held.batcher.failure is None
        switching.result(PATIENCE_S)
        waiting.result(PATIENCE_S)
    assert one.loaded == {"b"}
    assert memory.opened == ["a", "b"], "not with half a batch beside the old one"


def test_a_new_model_that_never_fits(house: Builder) -> None:
    """The old one is loaded again, and the reload reports what was wrong."""
    memory = Memory(2, {"a": 2, "b": 9})
    one = house(memory)
    one.switch("a")
    before = one.registry.served.models["a"]
    with pytest.raises(OutOfMemory, match="b needs"):
        one.switch("b")
    after = one.registry.served.models["a"]
    assert after is not before
    assert after.batcher.failure is None
    assert one.registry.served.names == ("a",)
    one.switch("a")
    assert one.registry.served.models["a"] is after


def test_old_requests_that_do_not_end(house: Builder) -> None:
    """After a while the reload gives up: the old model never stopped, and serves on."""
    memory = Memory(2, {"a": 2, "b": 2})
    one = house(memory, drain_s=0.05)
    one.switch("a")
    with one.registry.lease("a") as held:
        with pytest.raises(OutOfMemory, match=r"requests still hold these after 0\.05 s"):
            one.switch("b")
        assert one.registry.served.models["a"] is held
    assert one.registry.left([held], PATIENCE_S), "it is not on its way out any more"
    assert one.registry.served.models["a"] is held
    ticket = held.batcher.ticket()
    ticket.submit(silence(1.0), DecodeRequest())
    assert isinstance(ticket.collect(), Hypothesis)
    assert (memory.opened, len(memory.used)) == (["a"], 1)


def test_what_stays_is_not_touched(house: Builder) -> None:
    """Only the models that leave make room."""
    memory = Memory(3, {"a": 1, "b": 2, "c": 2})
    one = house(memory)
    one.switch("a", "b")
    stays = one.registry.served.models["a"]
    one.switch("a", "c")
    assert one.registry.served.models["a"] is stays
    assert one.loaded == {"a", "c"}


def test_a_gpu_is_not_shared_by_accident(house: Builder) -> None:
    """An engine that took what was free of a GPU leaves room for a crippled one only: it goes first."""
    memory = Memory(9, {"a": 1, "b": 1}, device="cuda")
    one = house(memory)
    one.switch("a")
    with ThreadPoolExecutor(1) as pool:
        with one.registry.lease("a"):
            switching = pool.submit(one.switch, "b")
            until(lambda: not one.loaded)
            assert memory.opened == ["a"]
        switching.result(PATIENCE_S)
    assert memory.opened == ["a", "b"]


def decoded(one: House, name: str, clip: Clip) -> str:
    with one.registry.lease(name) as model:
        ticket = model.batcher.ticket()
        ticket.submit(clip.samples(), DecodeRequest())
        outcome = ticket.collect()
        ticket.close()
        assert isinstance(outcome, Hypothesis)
        return model.vocabulary.decode(outcome.tokens)


def test_with_real_weights(house: Builder, clips: dict[str, Clip]) -> None:
    """Real engines in processes of their own: the old process is gone when the new one serves, and both read right."""
    memory = Memory(2, {"a": 2, "b": 2}, real=True)
    one = house(memory, own=True)
    one.switch("a")
    first = decoded(one, "a", clips["monkeys"])
    pid = one.registry.served.models["a"].batcher.health.pid
    one.switch("b")
    assert not Path(f"/proc/{pid}").exists()
    assert decoded(one, "b", clips["monkeys"]) == first
    assert plain(first) == plain(clips["monkeys"].text)


class SlowLoader:
    """A loader that switches until it is told to end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.threads: set[int] = set()

    def switch(self, *_: object) -> None:
        assert self.may_end.wait(PATIENCE_S)

    def load_one(self, _: str) -> None:
        self.threads.add(threading.get_ident())


def test_requests_wait_for_a_switch_without_threads() -> None:
    """Any number of them, up to a limit of time; then they hear when to come back."""
    loader = SlowLoader()

    async def run() -> Sequence[object]:
        queue = LoaderQueue(loader, patience_s=0.05)  # type: ignore[arg-type]
        switching = asyncio.create_task(queue.switch(Config(), {}))
        await asyncio.sleep(0)
        impatient = await asyncio.gather(*(queue.load_one("a") for _ in range(50)), return_exceptions=True)
        patient_queue = LoaderQueue(loader)  # type: ignore[arg-type]
        loader.may_end.set()
        await switching
        await patient_queue.load_one("a")
        await queue.load_one("a")
        return impatient

    answers = asyncio.run(run())
    assert all(isinstance(answer, ModelLoading) and answer.retry_after_s > 0 for answer in answers)
    assert len(loader.threads) <= 2
