"""An engine that stops, fails to open, and opens again: every window is answered, and the state is visible."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.support.fakes import FakeEngine, written
from tests.support.speech import silence
from whisperd.engine.base import DecodeRequest, EngineHealth, EngineInfo, Hypothesis, Outcome, Window, WindowFailure
from whisperd.engine.resilient.engine import ResilientEngine
from whisperd.engine.resilient.reopener import Openers
from whisperd.errors import EngineError, ModelLoading
from whisperd.metrics import ModelMeter
from whisperd.speech.tokenizer import Vocabulary

PATIENCE_S = 30.0


class Counted(ModelMeter):
    def __init__(self) -> None:
        self.died = self.restarted = 0

    def count_engine_failure(self) -> None:
        self.died += 1

    def count_engine_restart(self) -> None:
        self.restarted += 1


class Machine:
    """A GPU that can be broken and repaired, a CPU that always works, and the engines that were opened on them.

    ``poison`` are windows over which an engine stops; ``gate`` blocks every engine while it is not set.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.gpu_works = True
        self.poison: frozenset[int] = frozenset()
        self.gate = threading.Event()
        self.gate.set()
        self.cpu_gate = threading.Event()  # holds back the opening of the CPU
        self.cpu_gate.set()
        self.opened: list[Device] = []
        self.meter = Counted()
        self.tried = threading.Semaphore(0)  # one for each try to open the GPU

    def open_gpu(self) -> Device:
        self.tried.release()
        if not self.gpu_works:
            raise EngineError("the GPU fell off the bus")
        return self.open("cuda")

    def open_cpu(self) -> Device:
        assert self.cpu_gate.wait(PATIENCE_S)
        return self.open("cpu")

    def open(self, device: str) -> Device:
        self.opened.append(Device(self, device))
        return self.opened[-1]

    def break_gpu(self, *, for_good: bool = True) -> None:
        self.gpu_works = not for_good
        for engine in self.opened:
            engine.broken = engine.broken or engine.info.device == "cuda"


class Device(FakeEngine):
    """An engine on one device of the machine."""

    def __init__(self, machine: Machine, device: str) -> None:
        super().__init__(machine.vocabulary, self.answer)
        self.machine = machine
        self.broken = False
        info = self.info
        self.health = EngineHealth()
        self.info = EngineInfo(
            engine=info.engine,
            device=device,
            compute_type=info.compute_type,
            multilingual=info.multilingual,
            languages=info.languages,
            slots=info.slots,
        )

    def answer(self, window: Window) -> Hypothesis:
        return written(self.machine.vocabulary, window, f" {self.info.device}")

    def step(self) -> Sequence[Outcome]:
        if self.broken or {window.id for window in self._running} & self.machine.poison:
            raise EngineError("an illegal memory access was encountered")
        if not self.machine.gate.is_set():
            time.sleep(0.001)
            return []
        return super().step()


@pytest.fixture
def machine(vocabulary: Vocabulary) -> Machine:
    return Machine(vocabulary)


Opener = Callable[..., ResilientEngine]


@pytest.fixture
def opened(machine: Machine) -> Iterator[Opener]:
    engines: list[ResilientEngine] = []

    def open_one(*, stand_in: bool = False, wait_first_s: float = 0.001) -> ResilientEngine:
        openers = Openers(main=machine.open_gpu, fallback=machine.open_cpu if stand_in else None)
        engines.append(
            ResilientEngine(machine.open_gpu(), openers, name="x", meter=machine.meter, wait_first_s=wait_first_s)
        )
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


def admit(engine: ResilientEngine, *keys: int) -> None:
    engine.admit([Window(id=key, samples=silence(1.0), request=DecodeRequest()) for key in keys])


def until(engine: ResilientEngine, condition: Callable[[dict[int, Outcome]], object]) -> dict[int, Outcome]:
    """Steps until the condition holds for the results."""
    found: dict[int, Outcome] = {}
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition(found):
        assert time.monotonic() < deadline_s, f"it did not become true; got {found}"
        for outcome in engine.step():
            assert outcome.window_id not in found, "a window came out twice"
            found[outcome.window_id] = outcome
    return found


def texts(machine: Machine, found: dict[int, Outcome]) -> dict[int, str]:
    return {
        key: machine.vocabulary.decode(outcome.tokens).strip() if isinstance(outcome, Hypothesis) else "failed"
        for key, outcome in found.items()
    }


def test_windows_survive_their_engine(machine: Machine, opened: Opener) -> None:
    """Windows that were inside are decoded by the next engine, once each."""
    engine = opened()
    admit(engine, 1, 2, 3)
    machine.break_gpu(for_good=False)
    found = until(engine, lambda found: len(found) == 3)
    assert texts(machine, found) == {1: "cuda", 2: "cuda", 3: "cuda"}
    assert (machine.meter.died, machine.meter.restarted, engine.health.restarts, len(machine.opened)) == (1, 1, 1, 2)
    assert machine.opened[0].closed
    assert engine.health.outage == engine.health.fallback == ""


def test_it_comes_back_without_a_window(machine: Machine, opened: Opener) -> None:
    """One ``step`` detects the exit; the callback is called when there is work again."""
    engine = opened()
    told = threading.Event()
    engine.on_wake(told.set)
    told.clear()
    machine.break_gpu(for_good=False)
    engine.step()
    assert told.wait(PATIENCE_S)
    assert "illegal memory access" in engine.health.outage
    engine.step()
    assert engine.health.outage == ""


def test_cancelled_windows_do_not_come_back(machine: Machine, opened: Opener) -> None:
    """Cancelled windows are not decoded again."""
    engine = opened()
    machine.gate.clear()
    admit(engine, 1, 2)
    engine.step()
    engine.cancel(frozenset({1}))
    machine.break_gpu(for_good=False)
    machine.gate.set()
    assert set(until(engine, lambda found: 2 in found)) == {2}
    assert engine.free_slots == engine.info.slots
    assert [window.id for window in machine.opened[1].seen] == [2]


def test_windows_fail_when_it_does_not_come_back(machine: Machine, opened: Opener) -> None:
    """After two failed tries windows fail as "later", with the reason; when the engine is back, they are decoded."""
    engine = opened(wait_first_s=0.05)
    admit(engine, 1)
    machine.break_gpu()
    found = until(engine, lambda found: 1 in found)
    admit(engine, 2)
    found |= until(engine, lambda found: 2 in found)
    for outcome in found.values():
        assert isinstance(outcome, WindowFailure)
        assert isinstance(outcome.error, ModelLoading)
        assert "the GPU fell off the bus" in str(outcome.error)
        assert 1 <= outcome.error.retry_after_s < 130
    machine.gpu_works = True
    until(engine, lambda _: not engine.health.outage)
    admit(engine, 3)
    assert texts(machine, until(engine, lambda found: 3 in found)) == {3: "cuda"}


def test_tries_become_rare(machine: Machine, opened: Opener) -> None:
    """The waits between tries to open a lost GPU double."""
    engine = opened(wait_first_s=0.2)
    machine.tried.acquire()
    machine.break_gpu()
    times_s = []
    engine.step()
    for _ in range(4):
        assert machine.tried.acquire(timeout=PATIENCE_S)
        times_s.append(time.monotonic())
    waits_s = [after - before for before, after in itertools.pairwise(times_s)]
    assert [wait_s > floor_s for wait_s, floor_s in zip(waits_s, (0.19, 0.39, 0.79), strict=True)] == [True] * 3


def test_no_stand_in_unasked(machine: Machine, opened: Opener) -> None:
    """Nothing is opened on the CPU unless this is allowed."""
    engine = opened()
    admit(engine, 1)
    machine.break_gpu()
    until(engine, lambda found: 1 in found)
    assert {one.info.device for one in machine.opened} == {"cuda"}


def test_a_stand_in_serves_until_the_gpu_is_back(machine: Machine, opened: Opener) -> None:
    """When a GPU is lost, the CPU takes the windows, visibly; the GPU opens again beside it, and no window is lost."""
    engine = opened(stand_in=True, wait_first_s=0.05)
    admit(engine, 1, 2)
    machine.break_gpu()
    found = until(engine, lambda found: len(found) == 2)
    assert texts(machine, found) == {1: "cpu", 2: "cpu"}
    assert (engine.info.device, engine.health.fallback) == ("cpu", "the GPU fell off the bus")
    machine.gate.clear()
    admit(engine, 3)
    engine.step()
    machine.gpu_works = True
    until(engine, lambda _: engine.info.device == "cuda")
    assert engine.health.fallback == ""
    admit(engine, 4)
    engine.step()
    stand_in = machine.opened[1]
    assert not stand_in.closed, "it has a window inside"
    machine.gate.set()
    assert texts(machine, until(engine, lambda found: len(found) == 2)) == {3: "cpu", 4: "cuda"}
    until(engine, lambda _: stand_in.closed)
    assert [one.info.device for one in machine.opened] == ["cuda", "cpu", "cuda"]


def test_windows_wait_for_the_stand_in(machine: Machine, opened: Opener) -> None:
    """A stand-in may take long to open: windows wait and are not refused meanwhile."""
    engine = opened(stand_in=True)
    admit(engine, 1)
    machine.cpu_gate.clear()
    machine.break_gpu()
    for _ in range(3):
        until(engine, lambda _: machine.tried.acquire(blocking=False))
    assert [list(engine.step()) for _ in range(3)] == [[], [], []]
    machine.cpu_gate.set()
    assert texts(machine, until(engine, lambda found: 1 in found)) == {1: "cpu"}


def test_the_stand_in_stops_too(machine: Machine, opened: Opener) -> None:
    """Another engine replaces the stand-in and takes its windows."""
    engine = opened(stand_in=True, wait_first_s=0.05)
    machine.break_gpu()
    until(engine, lambda _: engine.health.fallback)
    admit(engine, 1)
    machine.opened[-1].broken = True
    assert texts(machine, until(engine, lambda found: 1 in found)) == {1: "cpu"}
    assert [one.info.device for one in machine.opened] == ["cuda", "cpu", "cpu"]


def test_one_bad_window(machine: Machine, opened: Opener) -> None:
    """A window over which the engine stops each time fails after three times; the other windows are decoded."""
    machine.poison = frozenset({2})
    engine = opened()
    admit(engine, 1, 2, 3)
    found = until(engine, lambda found: len(found) == 3)
    assert texts(machine, found) == {1: "cuda", 2: "failed", 3: "cuda"}
    failure = found[2]
    assert isinstance(failure, WindowFailure)
    assert "failed 3 times over this audio; last: an illegal memory access" in str(failure.error)
    assert [window.id for window in machine.opened[2].seen][:1] == [1], "alone, after two deaths"
    assert machine.meter.died == 3
    admit(engine, 4)
    assert texts(machine, until(engine, lambda found: 4 in found)) == {4: "cuda"}


def test_closed_while_it_is_opened_again(machine: Machine) -> None:
    """An engine that has opened after the close is closed as well."""
    begun, may_open = threading.Event(), threading.Event()

    def slow() -> Device:
        begun.set()
        assert may_open.wait(PATIENCE_S)
        return machine.open("cuda")

    engine = ResilientEngine(machine.open_gpu(), Openers(main=slow), name="x")
    machine.break_gpu()
    engine.step()
    assert begun.wait(PATIENCE_S)
    engine.close()
    may_open.set()
    deadline_s = time.monotonic() + PATIENCE_S
    while not (len(machine.opened) == 2 and machine.opened[1].closed):
        assert time.monotonic() < deadline_s
