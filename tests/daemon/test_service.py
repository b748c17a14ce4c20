"""The daemon behind its interface: requests, the queue, models that die."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import FakeEngine, Script, written
from tests.support.speech import Clip, wav
from whisperd.config import load
from whisperd.daemon.registry import Registry, Served
from whisperd.daemon.service import DaemonService, State
from whisperd.engine.base import Hypothesis, Window
from whisperd.errors import EngineError, QueueFull
from whisperd.metrics.prometheus import Metrics
from whisperd.serving.interface import Chunking, Emit, Job, ReconcileOrder
from whisperd.serving.spool import Spool
from whisperd.speech.fallback import Options
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.transcript import Transcript
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.batcher import Batcher
from whisperd.transcription.model import LoadedModel


class House:
    """A service on engines that answer by script; every load takes the next script."""

    def __init__(self, vocabulary: Vocabulary, detector: SpeechDetector, scripts: Iterator[Script]) -> None:
        self.vocabulary = vocabulary
        self.detector = detector
        self.scripts = scripts
        self.loads = 0
        self.registry = Registry()
        self.registry.swap(Served(names=("x",)))

    async def load_one(self, name: str) -> None:
        self.loads += 1
        batcher = Batcher(FakeEngine(self.vocabulary, next(self.scripts)), name=name)
        model = LoadedModel(name=name, vocabulary=self.vocabulary, batcher=batcher, detector=self.detector)
        self.registry.swap(self.registry.served.with_model(model))

    async def nothing(self) -> dict[str, Any]:
        return {}

    async def no_order(self, _order: ReconcileOrder, _tell: Emit) -> dict[str, Any]:
        return {}

    @contextmanager
    def service(self, *overrides: str) -> Iterator[DaemonService]:
        loaded = load(Path("/dev/null"), overrides, environ={}, cwd=Path("/"))
        state = State(loaded=loaded, cache_dir="/nowhere")
        state.become("ready")
        service = DaemonService(
            state,
            self.registry,
            Metrics(),
            Spool(Path("/nowhere"), upload_bytes=1, budget_bytes=1),
            load_one=self.load_one,
            reload=self.nothing,
            reconcile=self.no_order,
        )
        try:
            yield service
        finally:
            service.close()
            self.registry.close()


Builder = Callable[..., House]


@pytest.fixture
def house(vocabulary: Vocabulary, detector: SpeechDetector) -> Builder:
    return lambda *scripts: House(vocabulary, detector, iter(scripts))


async def transcribed(service: DaemonService, clip: Clip) -> Transcript:
    """A request as the HTTP interface makes it."""
    with await service.admit() as admission:
        return await service.transcribe(job(clip, admission=admission))


def job(clip: Clip, **changes: Any) -> Job:
    return Job(
        audio=wav(clip.samples()), filename="x.wav", model=None, options=Options(), chunking=Chunking(),
        request_id="id", **changes
    )  # fmt: skip


def dies(_: Window) -> Hypothesis:
    raise MemoryError("the device is gone")


def test_a_request_survives_a_dead_engine(house: Builder, clips: dict[str, Clip], vocabulary: Vocabulary) -> None:
    """The engine dies in the middle of the first request; it is loaded again, and both requests are answered."""
    found = house(dies, lambda window: written(vocabulary, window, " hello"))
    with found.service() as service:

        async def both() -> list[str]:
            first = await transcribed(service, clips["monkeys"])
            return [first.text, (await transcribed(service, clips["monkeys"])).text]

        assert asyncio.run(both()) == ["hello", "hello"]
        requests = service.status()["requests"]
    assert found.loads == 2
    assert isinstance(requests, dict)
    assert (requests["done"], requests["failed"]) == (2, 0)


def test_an_engine_that_dies_again(house: Builder, clips: dict[str, Clip]) -> None:
    """A request is begun again once; then its client hears what happened."""
    found = house(dies, dies)
    with found.service() as service, pytest.raises(EngineError, match="the device is gone"):
        asyncio.run(transcribed(service, clips["monkeys"]))
    assert found.loads == 2


def test_a_failed_window_is_not_a_dead_engine(house: Builder, clips: dict[str, Clip]) -> None:
    """What fails by itself would fail again: no second attempt."""
    found = house(lambda _: RuntimeError("boom"))
    with found.service() as service, pytest.raises(EngineError, match="boom"):
        asyncio.run(transcribed(service, clips["monkeys"]))
    assert found.loads == 1


def test_the_queue_is_bounded(house: Builder, clips: dict[str, Clip], vocabulary: Vocabulary) -> None:
    """Beside a request of 73 s another one is too much audio for a queue of 75 s, and a third too many requests."""
    found = house(lambda window: written(vocabulary, window, " hello"))
    with found.service("limits.queue_audio_s=75", "limits.requests=2") as service:

        async def run() -> list[Any]:
            jobs = [transcribed(service, clips["instruct"]) for _ in range(3)]
            return await asyncio.gather(*jobs, return_exceptions=True)

        answers = asyncio.run(run())
        refused = [answer for answer in answers if isinstance(answer, QueueFull)]
        assert any("limits.requests" in str(answer) for answer in refused)
        assert all(answer.retry_after_s >= 1 for answer in refused)
        assert len(refused) < 3
        backlog = service.status()["requests"]
    assert isinstance(backlog, dict)
    assert (backlog["active"], backlog["waiting_audio_s"]) == (0, 0)
