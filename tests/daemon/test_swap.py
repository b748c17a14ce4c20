"""A reload whose new model does not fit beside the old one: the old one is unloaded first, and restored on failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.fakes import FakeEngine
from tests.support.models import House
from tests.support.speech import Clip, plain, silence
from tests.support.wait import PATIENCE_S, until
from whisperd.config import Config, ModelTable
from whisperd.daemon.leases import Leases
from whisperd.daemon.loader import Loader
from whisperd.daemon.models import ModelInstance
from whisperd.daemon.open_model import ModelOpener
from whisperd.engine.base import DecodeRequest, Engine, EngineInfo, Hypothesis
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.errors import ModelLoading, OutOfMemory
from whisperd.metrics import ModelMeter
from whisperd.metrics.prometheus import Metrics
from whisperd.speech.tokenizer import Vocabulary


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


Builder = Callable[..., House]


@pytest.fixture
def house(tmp_path: Path, snapshot: Path) -> Iterator[Builder]:
    houses: list[House] = []

    def build(memory: Memory, *, drain_s: float = PATIENCE_S, own: bool = False) -> House:
        settings = EngineSettings(workers=1, batch_size=2, threads_per_worker=2, own_process=own)
        opener = ModelOpener(settings, tmp_path, Metrics(), opener=memory.open)
        houses.append(House(tmp_path, snapshot, opener, drain_s=drain_s))
        return houses[-1]

    yield build
    for one in houses:
        one.close()


def test_beside_where_there_is_room(house: Builder) -> None:
    """With room for both, the old model is unloaded only after the new one is loaded."""
    memory = Memory(2, {"a": 1, "b": 1})
    one = house(memory)
    one.switch("a")
    with one.leases.lease("a") as held:
        one.switch("b")
        assert one.loaded == {"b"}
        assert held.batcher.failure is None
    until(lambda: sum(memory.used.values()) == 1)


def test_the_old_one_goes_first(house: Builder) -> None:
    """Without room for both, the reload waits for the old model's last request; new requests wait meanwhile."""
    memory = Memory(3, {"a": 2, "b": 2})
    one = house(memory)
    one.switch("a")
    with ThreadPoolExecutor(2) as pool:
        with one.leases.lease("a") as held:
            switching = pool.submit(one.switch, "b")
            until(lambda: not one.loaded)
            waiting = pool.submit(one.load_one, "a")
            assert not switching.done()
            assert not waiting.done()
            assert held.batcher.failure is None
        switching.result(PATIENCE_S)
        waiting.result(PATIENCE_S)
    assert one.loaded == {"b"}
    assert memory.opened == ["a", "b"], "not with half a batch beside the old one"


def test_a_new_model_that_never_fits(house: Builder) -> None:
    """The old model is loaded again, and the reload reports the error."""
    memory = Memory(2, {"a": 2, "b": 9})
    one = house(memory)
    one.switch("a")
    before = one.model("a")
    with pytest.raises(OutOfMemory, match="b needs"):
        one.switch("b")
    after = one.model("a")
    assert after is not before
    assert after.batcher.failure is None
    assert [entry.name for entry in one.leases.served] == ["a"]
    one.switch("a")
    assert one.model("a") is after


def test_old_requests_that_do_not_end(house: Builder) -> None:
    """After a time limit the reload fails; the old model kept serving all the time."""
    memory = Memory(2, {"a": 2, "b": 2})
    one = house(memory, drain_s=0.05)
    one.switch("a")
    instance = one.leases.served.models[0].instance
    assert instance is not None
    with one.leases.lease("a") as held:
        with pytest.raises(OutOfMemory, match=r"requests still hold these after 0\.05 s"):
            one.switch("b")
        assert one.model("a") is held
    assert one.leases.wait_closed([instance], PATIENCE_S), "it is not on its way out any more"
    assert one.model("a") is held
    ticket = held.batcher.ticket()
    ticket.submit(silence(1.0), DecodeRequest())
    assert isinstance(ticket.collect(), Hypothesis)
    assert (memory.opened, len(memory.used)) == (["a"], 1)


def test_what_stays_is_not_touched(house: Builder) -> None:
    """Only models that are removed are unloaded to make room."""
    memory = Memory(3, {"a": 1, "b": 2, "c": 2})
    one = house(memory)
    one.switch("a", "b")
    stays = one.model("a")
    one.switch("a", "c")
    assert one.model("a") is stays
    assert one.loaded == {"a", "c"}


def test_a_gpu_is_not_shared_by_accident(house: Builder) -> None:
    """An engine that took a GPU's free memory leaves room for a reduced one only, so it is unloaded first."""
    memory = Memory(9, {"a": 1, "b": 1}, device="cuda")
    one = house(memory)
    one.switch("a")
    with ThreadPoolExecutor(1) as pool:
        with one.leases.lease("a"):
            switching = pool.submit(one.switch, "b")
            until(lambda: not one.loaded)
            assert memory.opened == ["a"]
        switching.result(PATIENCE_S)
    assert memory.opened == ["a", "b"]


def decoded(one: House, name: str, clip: Clip) -> str:
    with one.leases.lease(name) as model:
        ticket = model.batcher.ticket()
        ticket.submit(clip.samples(), DecodeRequest())
        outcome = ticket.collect()
        ticket.close()
        assert isinstance(outcome, Hypothesis)
        return model.vocabulary.decode(outcome.tokens)


def test_with_real_weights(house: Builder, clips: dict[str, Clip]) -> None:
    """With real engines in processes, the old process is gone when the new one serves, and both read correctly."""
    memory = Memory(2, {"a": 2, "b": 2}, real=True)
    one = house(memory, own=True)
    one.switch("a")
    first = decoded(one, "a", clips["monkeys"])
    pid = one.model("a").batcher.health.pid
    one.switch("b")
    assert not Path(f"/proc/{pid}").exists()
    assert decoded(one, "b", clips["monkeys"]) == first
    assert plain(first) == plain(clips["monkeys"].text)


class SlowOpener(ModelOpener):
    """Opens nothing until it is released; then raises OutOfMemory."""

    def __init__(self) -> None:
        super().__init__(EngineSettings(), Path("/nowhere"), Metrics())
        self.may_end = threading.Event()
        self.threads: set[int] = set()

    def open(self, name: str, snapshot: Path, *, again: bool = False, beside: bool = False) -> ModelInstance:
        del snapshot, again, beside
        self.threads.add(threading.get_ident())
        assert self.may_end.wait(PATIENCE_S)
        raise OutOfMemory(f"{name} does not fit")


def config(names: Sequence[str]) -> Config:
    return Config(models=tuple(ModelTable(repo=f"path:/{name}", name=name) for name in names))


def test_requests_wait_for_a_switch_without_threads(tmp_path: Path) -> None:
    """Any number of requests wait without threads, up to a time limit, and then get an error with a time to retry."""
    opener = SlowOpener()

    async def run() -> Sequence[object]:
        loader = Loader(Leases(), opener, patience_s=0.05)
        switching = asyncio.create_task(loader.switch(config(["a"]), {"a": tmp_path}))
        await asyncio.sleep(0)
        impatient = await asyncio.gather(*(loader.load_one("a") for _ in range(50)), return_exceptions=True)
        opener.may_end.set()
        with pytest.raises(OutOfMemory):
            await switching
        await loader.load_one("a")  # which is not declared, since the switch has failed
        return impatient

    answers = asyncio.run(run())
    assert all(isinstance(answer, ModelLoading) and answer.retry_after_s > 0 for answer in answers)
    assert len(opener.threads) == 1


def test_a_client_that_leaves_does_not_end_the_turn(tmp_path: Path) -> None:
    """A cancelled change continues in its thread and the next one waits for it: models are changed one at a time."""
    opener = SlowOpener()

    async def run() -> None:
        loader = Loader(Leases(), opener, patience_s=0.05)
        switching = asyncio.create_task(loader.switch(config(["a"]), {"a": tmp_path}))
        await asyncio.to_thread(until, lambda: opener.threads)
        switching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await switching
        with pytest.raises(ModelLoading, match="waits for other models"):
            await loader.load_one("a")
        opener.may_end.set()
        await loader.load_one("a")

    asyncio.run(run())
    assert len(opener.threads) == 1
