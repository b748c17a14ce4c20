"""A lost GPU: 503 with the reason, or the CPU in its place where the configuration allows it, and the way back."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.fakes import FakeEngine
from tests.support.models import House, ready_state, transcribed
from tests.support.speech import Clip, silence
from tests.support.wait import until
from whisperd.daemon.open_model import ModelOpener, load, on_cpu
from whisperd.daemon.service import DaemonService
from whisperd.daemon.state import State
from whisperd.engine.base import DecodeRequest, Engine, EngineHealth, EngineInfo, Hypothesis, Outcome
from whisperd.engine.factory import EngineSettings
from whisperd.errors import EngineError, ModelLoading, SourceError
from whisperd.metrics import ModelMeter
from whisperd.metrics.prometheus import Metrics
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.model import LoadedModel


class Device(FakeEngine):
    """An engine that works as long as its device does."""

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


class Served:
    """A model on that machine, and the daemon's service around it."""

    def __init__(self, house: House, service: DaemonService, state: State) -> None:
        self.house = house
        self.service = service
        self.state = state

    @property
    def model(self) -> LoadedModel:
        return self.house.model("a")

    @property
    def status(self) -> str:
        return self.house.status(self.state).line()

    def transcribe(self, clip: Clip) -> str:
        return self.house.run(transcribed(self.service, clip)).text

    def decode(self) -> Outcome | None:
        ticket = self.model.batcher.ticket()
        ticket.submit(silence(1.0), DecodeRequest())
        outcome = ticket.collect()
        ticket.close()
        return outcome

    def figure(self, name: str) -> float:
        lines = self.service.metrics("")[0].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f'{name}{{model="a"')).rpartition(" ")[2])


Builder = Callable[..., Served]


@pytest.fixture
def served(snapshot: Path, tmp_path: Path) -> Iterator[Builder]:
    with ExitStack() as stack:

        def build(machine: Machine, **changes: object) -> Served:
            settings = EngineSettings(device="auto", compute_type="float16", **changes)  # type: ignore[arg-type]
            metrics = Metrics()
            opener = ModelOpener(settings, tmp_path, metrics, opener=machine.open)
            directory = Path(tempfile.mkdtemp(dir=tmp_path))
            house = stack.enter_context(closing(House(directory, snapshot, opener)))
            house.switch("a")
            state = ready_state('models = [{ repo = "path:/a", name = "a" }]')
            return Served(house, stack.enter_context(house.service(state, metrics)), state)

        yield build


def test_without_the_option(served: Builder, clips: dict[str, Clip]) -> None:
    """Clients get 503 with the reason and a time; the CPU is not used; when the GPU is back, the model serves again."""
    machine = Machine()
    one = served(machine)
    machine.gpu_works = False
    with pytest.raises(ModelLoading, match="no GPU is there any more") as caught:
        one.transcribe(clips["monkeys"])
    assert caught.value.http_status == 503
    assert caught.value.retry_after_s >= 1
    assert "a DOWN (no GPU is there any more)" in one.status
    assert one.service.device(None) is None
    machine.gpu_works = True
    until(lambda: not one.model.batcher.health.outage)
    assert one.transcribe(clips["monkeys"]) == "hello"
    # the GPU is named, since "auto" would take the CPU without an error
    assert set(machine.asked[1:]) == {"cuda"}


def test_with_the_option(served: Builder, clips: dict[str, Clip], caplog: pytest.LogCaptureFixture) -> None:
    """The CPU serves, shown in log, status, STATUS, metrics and header; then the GPU serves again; no request fails."""
    machine = Machine()
    one = served(machine, cpu_fallback=True)
    assert one.service.device(None) == "cuda"
    machine.gpu_works = False
    with caplog.at_level(logging.WARNING):
        assert one.transcribe(clips["monkeys"]) == "hello"
    assert "served by a fallback on the cpu: no GPU is there any more" in caplog.text
    assert one.service.device(None) == "cpu (fallback)"
    assert "a (cpu, float32, fallback: no GPU is there any more)" in one.status
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


def test_lost_before_the_boot(served: Builder, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon starts on the CPU where this is allowed, and fails where it is not."""
    machine = Machine()
    machine.gpu_works = False
    with pytest.raises(EngineError, match="no GPU is there"):
        served(machine)
    with caplog.at_level(logging.WARNING):
        one = served(machine, cpu_fallback=True)
    assert "instead of the GPU: no GPU is there any more" in caplog.text
    assert one.service.device(None) == "cpu (fallback)"
    assert isinstance(one.decode(), Hypothesis)
    machine.gpu_works = True
    until(lambda: one.service.device(None) == "cuda")


def test_a_wrong_model_is_no_lost_gpu(snapshot: Path, tmp_path: Path, detector: SpeechDetector) -> None:
    """Wrong model files are an error on every device."""

    def no_model(*_: object) -> Engine:
        raise SourceError("this is no model")

    with pytest.raises(SourceError):
        load("x", snapshot, EngineSettings(cpu_fallback=True), tmp_path, detector, opener=no_model)


def test_on_cpu() -> None:
    """On the CPU, number formats that only GPUs have are not used."""
    assert on_cpu(EngineSettings(device="cuda", compute_type="float16")) == EngineSettings(device="cpu")
    assert on_cpu(EngineSettings(compute_type="float32")) == EngineSettings(device="cpu", compute_type="float32")
