"""A GPU that is lost: 503 with the reason, or the CPU in its place where the configuration says so, and back."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.daemon.test_service import transcribed
from tests.support.fakes import FakeEngine
from tests.support.speech import Clip, silence
from whisperd.config import load as load_config
from whisperd.daemon.open_model import load, on_cpu
from whisperd.daemon.registry import Registry, Served
from whisperd.daemon.service import DaemonService, State
from whisperd.daemon.systemd import status_line
from whisperd.engine.base import DecodeRequest, Engine, EngineHealth, EngineInfo, Hypothesis, Outcome
from whisperd.engine.factory import EngineSettings
from whisperd.errors import EngineError, ModelLoading, SourceError
from whisperd.metrics import ModelMeter
from whisperd.metrics.prometheus import Metrics
from whisperd.serving.interface import Emit, ReconcileOrder
from whisperd.serving.spool import Spool
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.model import LoadedModel

PATIENCE_S = 60.0


class Device(FakeEngine):
    """Works as long as its device does."""

    def __init__(self, vocabulary: Vocabulary, device: str, broken: Callable[[], bool]) -> None:
        super().__init__(vocabulary)
        self.broken = broken
        self.health = EngineHealth()
        self.info = EngineInfo(
            engine="fake", device=device, compute_type="float32", multilingual=False, languages=("en",), slots=4
        )

    def step(self) -> Sequence[Outcome]:
        if self.broken():
            raise EngineError("CUDA error: unspecified launch failure")
        return super().step()


class Machine:
    """One GPU, which may fall off the bus, and a CPU."""

    def __init__(self) -> None:
        self.gpu_works = True
        self.asked: list[str] = []

    def open(
        self, _snapshot: Path, vocabulary: Vocabulary, settings: EngineSettings, _work_dir: Path, _meter: ModelMeter
    ) -> Engine:
        self.asked.append(settings.device)
        if settings.device == "cpu":
            assert settings.compute_type == "auto", "float16 is nothing for a CPU"
            return Device(vocabulary, "cpu", lambda: False)
        if not self.gpu_works:
            raise EngineError("no GPU is there any more")
        return Device(vocabulary, "cuda", lambda: not self.gpu_works)


class House:
    """A served model on that machine, and the daemon's service around it."""

    def __init__(self, machine: Machine, model: LoadedModel, metrics: Metrics) -> None:
        self.machine = machine
        self.model = model
        self.registry = Registry()
        self.registry.swap(Served(names=("x",), models={"x": model}))
        loaded = load_config(Path("/dev/null"), ('models = ["path:/x"]',), environ={}, cwd=Path("/"))
        self.state = State(loaded=loaded, cache_dir="/nowhere")
        self.state.become("ready")
        self.service = DaemonService(
            self.state,
            self.registry,
            metrics,
            Spool(Path("/nowhere"), upload_bytes=1, budget_bytes=1),
            load_one=self.nothing,
            reload=self.no_reload,
            reconcile=self.no_order,
        )

    async def nothing(self, _name: str) -> None:
        raise AssertionError("a model that lasts is not loaded again")

    async def no_reload(self) -> dict[str, object]:
        return {}

    async def no_order(self, _order: ReconcileOrder, _tell: Emit) -> dict[str, object]:
        return {}

    @property
    def status(self) -> str:
        return status_line(self.state, self.registry.served)

    def decode(self) -> Outcome | None:
        ticket = self.model.batcher.ticket()
        ticket.submit(silence(1.0), DecodeRequest())
        outcome = ticket.collect()
        ticket.close()
        return outcome

    def figure(self, name: str) -> float:
        lines = self.service.metrics("")[0].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f'{name}{{model="x"')).rpartition(" ")[2])

    def close(self) -> None:
        self.service.close()
        self.registry.close()


Builder = Callable[..., House]


@pytest.fixture
def house(snapshot: Path, tmp_path: Path, detector: SpeechDetector) -> Iterator[Builder]:
    houses: list[House] = []

    def build(machine: Machine, **changes: object) -> House:
        settings = EngineSettings(device="auto", compute_type="float16", **changes)  # type: ignore[arg-type]
        metrics = Metrics()
        model = load("x", snapshot, settings, tmp_path, detector, metrics.model("x"), machine.open)
        houses.append(House(machine, model, metrics))
        return houses[-1]

    yield build
    for one in houses:
        one.close()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not become true"
        os.sched_yield()


def test_without_the_option(house: Builder, clips: dict[str, Clip]) -> None:
    """Clients get 503 with the reason and a time; the CPU is never asked; when the GPU is back, so is the model."""
    machine = Machine()
    one = house(machine)
    machine.gpu_works = False
    with pytest.raises(ModelLoading, match="no GPU is there any more") as caught:
        asyncio.run(transcribed(one.service, clips["monkeys"]))
    assert caught.value.http_status == 503
    assert caught.value.retry_after_s >= 1
    assert "x DOWN (no GPU is there any more)" in one.status
    assert one.service.device(None) is None
    machine.gpu_works = True
    until(lambda: not one.model.batcher.health.outage)
    assert asyncio.run(transcribed(one.service, clips["monkeys"])).text == "hello"
    # a GPU that was there is asked for by name, or "auto" would have taken the CPU without a word
    assert set(machine.asked[1:]) == {"cuda"}


def test_with_the_option(house: Builder, clips: dict[str, Clip], caplog: pytest.LogCaptureFixture) -> None:
    """The CPU serves, and says so in log, status, STATUS, metrics and header; then the GPU again. No request fails."""
    machine = Machine()
    one = house(machine, cpu_fallback=True)
    assert one.service.device(None) == "cuda"
    machine.gpu_works = False
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(transcribed(one.service, clips["monkeys"])).text == "hello"
    assert "served by a fallback on the cpu: no GPU is there any more" in caplog.text
    assert one.service.device(None) == "cpu (fallback)"
    assert "x (cpu, float32, fallback: no GPU is there any more)" in one.status
    assert one.figure("whisperd_model_fallback") == 1
    models = one.service.status()["models"]
    assert isinstance(models, list)
    shown = [models[0][key] for key in ("device", "loaded", "fallback")]
    assert shown == ["cpu", True, "no GPU is there any more"]
    machine.gpu_works = True
    until(lambda: one.service.device(None) == "cuda")
    assert isinstance(one.decode(), Hypothesis)
    assert one.figure("whisperd_model_fallback") == 0
    assert one.figure("whisperd_engine_failures_total") == 1
    assert one.model.batcher.failure is None


def test_lost_before_the_boot(house: Builder, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon boots on the CPU where it may, and does not where it may not."""
    machine = Machine()
    machine.gpu_works = False
    with pytest.raises(EngineError, match="no GPU is there"):
        house(machine)
    with caplog.at_level(logging.WARNING):
        one = house(machine, cpu_fallback=True)
    assert "instead of the GPU: no GPU is there any more" in caplog.text
    assert one.service.device(None) == "cpu (fallback)"
    assert isinstance(one.decode(), Hypothesis)
    machine.gpu_works = True
    until(lambda: one.service.device(None) == "cuda")


def test_a_wrong_model_is_no_lost_gpu(snapshot: Path, tmp_path: Path, detector: SpeechDetector) -> None:
    """What is wrong with the files is an error everywhere."""

    def no_model(*_: object) -> Engine:
        raise SourceError("this is no model")

    with pytest.raises(SourceError):
        load("x", snapshot, EngineSettings(cpu_fallback=True), tmp_path, detector, opener=no_model)


def test_on_cpu() -> None:
    """Number formats that only GPUs have do not follow."""
    assert on_cpu(EngineSettings(device="cuda", compute_type="float16")) == EngineSettings(device="cpu")
    assert on_cpu(EngineSettings(compute_type="float32")) == EngineSettings(device="cpu", compute_type="float32")
