"""The daemon behind its interface: requests, the queue, models whose engine fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import Script, written
from tests.support.models import House, ScriptedOpener, ready_state, transcribed
from tests.support.speech import Clip
from whisperd.engine.base import Hypothesis, Window
from whisperd.errors import EngineError, QueueFull
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.vad import SpeechDetector

Builder = Callable[..., tuple[House, ScriptedOpener]]


@pytest.fixture
def served(tmp_path: Path, snapshot: Path, vocabulary: Vocabulary, detector: SpeechDetector) -> Iterator[Builder]:
    houses: list[House] = []

    def build(*scripts: Script) -> tuple[House, ScriptedOpener]:
        opener = ScriptedOpener(vocabulary, detector, scripts)
        houses.append(House(tmp_path, snapshot, opener))
        houses[-1].switch("a")
        return houses[-1], opener

    yield build
    for house in houses:
        house.close()


def fails(_: Window) -> Hypothesis:
    raise MemoryError("the device is gone")


def test_a_request_survives_a_failed_engine(served: Builder, clips: dict[str, Clip], vocabulary: Vocabulary) -> None:
    """The engine fails in the middle of the first request; it is loaded again, and both requests are answered."""
    house, opener = served(fails, lambda window: written(vocabulary, window, " hello"))
    with house.service(ready_state()) as service:
        texts = [house.run(transcribed(service, clips["monkeys"])).text for _ in range(2)]
        assert texts == ["hello", "hello"]
        requests = service.status()["requests"]
    assert opener.n_opened == 2
    assert isinstance(requests, dict)
    assert (requests["done"], requests["failed"]) == (2, 0)


def test_an_engine_that_fails_again(served: Builder, clips: dict[str, Clip]) -> None:
    """A request is started again once; after a second failure its client gets the error."""
    house, opener = served(fails, fails)
    with house.service(ready_state()) as service, pytest.raises(EngineError, match="the device is gone"):
        house.run(transcribed(service, clips["monkeys"]))
    assert opener.n_opened == 2


def test_a_failed_window_is_not_a_failed_engine(served: Builder, clips: dict[str, Clip]) -> None:
    """A window that fails by itself is not retried, since it would fail again."""
    house, opener = served(lambda _: RuntimeError("boom"))
    with house.service(ready_state()) as service, pytest.raises(EngineError, match="boom"):
        house.run(transcribed(service, clips["monkeys"]))
    assert opener.n_opened == 1


def test_the_queue_is_bounded(served: Builder, clips: dict[str, Clip], vocabulary: Vocabulary) -> None:
    """Beside a request of 73 s another one is too much audio for a queue of 75 s, and a third too many requests."""
    house, _ = served(lambda window: written(vocabulary, window, " hello"))
    with house.service(ready_state("limits.queue_audio_s=75", "limits.requests=2")) as service:

        async def run() -> list[Any]:
            jobs = [transcribed(service, clips["instruct"]) for _ in range(3)]
            return await asyncio.gather(*jobs, return_exceptions=True)

        answers = house.run(run())
        refused = [answer for answer in answers if isinstance(answer, QueueFull)]
        assert any("limits.requests" in str(answer) for answer in refused)
        assert all(answer.retry_after_s >= 1 for answer in refused)
        assert len(refused) < 3
        requests = service.status()["requests"]
    assert isinstance(requests, dict)
    assert (requests["active"], requests["waiting_audio_s"]) == (0, 0)
