"""What every engine guarantees; ``whisperd.engine.base`` is the text of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support import openers
from tests.support.fakes import FakeEngine
from tests.support.speech import Clip
from whisperd.engine.base import DecodeRequest, Engine, Hypothesis, Outcome, Window, WindowFailure
from whisperd.engine.process import ChildEngine
from whisperd.errors import OutOfMemory
from whisperd.metrics import ModelMeter, Stage
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples

PATIENCE_S = 60.0
EMPTY_STEPS_MAX = 5000  # of at most 50 ms: a broken engine fails the test and does not hang it


def open_ct2(snapshot: Path, _: Vocabulary) -> Engine:
    return openers.ct2(snapshot, ModelMeter())


def open_fake(_: Path, vocabulary: Vocabulary) -> Engine:
    return FakeEngine(vocabulary, slots=6)


def open_cuda(snapshot: Path, _: Vocabulary) -> Engine:
    """The engine of GPUs, on the CPU in float32."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return openers.cuda(snapshot, ModelMeter())


def open_ct2_child(snapshot: Path, _: Vocabulary) -> Engine:
    return ChildEngine(partial(openers.ct2, snapshot), stall_timeout_s=PATIENCE_S)


def open_cuda_child(snapshot: Path, _: Vocabulary) -> Engine:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    return ChildEngine(partial(openers.cuda, snapshot), stall_timeout_s=PATIENCE_S)


OPENERS = {
    "fake": open_fake,
    "ct2": open_ct2,
    "cuda": open_cuda,
    "ct2 in a process": open_ct2_child,
    "cuda in a process": open_cuda_child,
}


@pytest.fixture(params=list(OPENERS.values()), ids=list(OPENERS), scope="module")
def engine(request: pytest.FixtureRequest, snapshot: Path, vocabulary: Vocabulary) -> Iterator[Engine]:
    opener: Callable[[Path, Vocabulary], Engine] = request.param
    engine = opener(snapshot, vocabulary)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def speech(clips: dict[str, Clip]) -> Samples:
    return clips["monkeys"].samples()


class Halvings(ModelMeter):
    def __init__(self) -> None:
        self.count = 0

    def count_halving(self, stage: Stage) -> None:
        assert stage == "decode"
        self.count += 1


def cramped_ct2(snapshot: Path, _: Vocabulary, room: int, meter: ModelMeter) -> Engine:
    return openers.cramped_ct2(snapshot, room, meter)


def cramped_child(snapshot: Path, _: Vocabulary, room: int, meter: ModelMeter) -> Engine:
    return ChildEngine(partial(openers.cramped_ct2, snapshot, room), stall_timeout_s=PATIENCE_S, meter=meter)


def cramped_fake(_: Path, vocabulary: Vocabulary, room: int, meter: ModelMeter) -> Engine:
    return FakeEngine(vocabulary, slots=6, room=room, meter=meter)


def drain(engine: Engine, n_windows: int) -> dict[int, Outcome]:
    """Steps until so many windows came out."""
    outcomes: list[Outcome] = []
    empty_steps = 0
    while len(outcomes) < n_windows and empty_steps < EMPTY_STEPS_MAX:
        found = engine.step()
        empty_steps = 0 if found else empty_steps + 1
        outcomes.extend(found)
    assert len(outcomes) == len({outcome.window_id for outcome in outcomes}) == n_windows
    return {outcome.window_id: outcome for outcome in outcomes}


def decode(engine: Engine, samples: Samples, request: DecodeRequest, *, audio: int | None = None) -> Hypothesis:
    engine.admit([Window(id=1, samples=samples, request=request, audio=audio)])
    outcome = drain(engine, 1)[1]
    assert isinstance(outcome, Hypothesis)
    return outcome


def test_slots(engine: Engine, speech: Samples) -> None:
    """Each admitted window takes a slot and returns it when it comes out, exactly once."""
    slots = engine.info.slots
    assert engine.free_slots == slots
    engine.admit([Window(id=key, samples=speech, request=DecodeRequest()) for key in range(slots)])
    assert engine.free_slots <= slots
    assert set(drain(engine, slots)) == set(range(slots))
    assert engine.free_slots == slots


def test_an_idle_engine_has_nothing(engine: Engine) -> None:
    """A step without windows returns soon and with nothing."""
    assert list(engine.step()) == []


def test_a_hypothesis_says_how_it_was_made(engine: Engine, speech: Samples, vocabulary: Vocabulary) -> None:
    """Temperature, language, scores and tokens are those of the contract."""
    found = decode(engine, speech, DecodeRequest(temperature=0.4, best_of=2))
    assert found.temperature == 0.4
    assert found.language in engine.info.languages
    assert 0.0 <= found.no_speech_prob <= 1.0
    assert found.avg_logprob <= 0.0
    assert found.alignment is None
    assert vocabulary.eot not in found.tokens
    assert found.tokens[0] >= vocabulary.timestamp_begin


def test_word_times(engine: Engine, speech: Samples, vocabulary: Vocabulary) -> None:
    """One time for each text token, in order, inside the window."""
    found = decode(engine, speech, DecodeRequest(word_timestamps=True))
    assert found.alignment is not None
    assert [time.token for time in found.alignment] == [token for token in found.tokens if token < vocabulary.eot]
    edges = [edge for time in found.alignment for edge in (time.start_s, time.end_s)]
    assert edges == sorted(edges)
    assert edges[-1] <= len(speech) / SAMPLE_RATE_HZ + 0.1
    assert all(0.0 <= time.probability <= 1.0 for time in found.alignment)


def test_a_batch_changes_nothing(engine: Engine, speech: Samples, clips: dict[str, Clip]) -> None:
    """Windows of different lengths and requests decode to the same tokens together as alone."""
    other = clips["agent"].samples()
    requests = [
        (speech, DecodeRequest()),
        (other, DecodeRequest(prompt_tokens=(2061, 318))),
        (speech[:16000], DecodeRequest(word_timestamps=True)),
        (np.concatenate([other, speech]), DecodeRequest()),
    ]
    alone = [decode(engine, samples, request).tokens for samples, request in requests]
    engine.admit([Window(id=key, samples=samples, request=request) for key, (samples, request) in enumerate(requests)])
    together = drain(engine, len(requests))
    assert [getattr(together[key], "tokens", None) for key in range(len(requests))] == alone


def test_audio_that_comes_again(engine: Engine, speech: Samples, clips: dict[str, Clip]) -> None:
    """Audio marked as the same decodes as if it were new, whatever was decoded between and beside it."""
    other = clips["agent"].samples()
    request = DecodeRequest(word_timestamps=True)
    fresh = decode(engine, speech, request)
    assert decode(engine, speech, DecodeRequest(), audio=7).tokens == fresh.tokens
    assert decode(engine, other, DecodeRequest(), audio=8).tokens != fresh.tokens or engine.info.engine == "fake"
    assert decode(engine, speech, request, audio=7) == fresh
    n_windows = engine.info.slots
    engine.admit([Window(id=key, samples=other, request=request) for key in range(1, n_windows)])
    engine.admit([Window(id=0, samples=speech, request=request, audio=7)])
    together = drain(engine, n_windows)[0]
    assert isinstance(together, Hypothesis)
    assert together.tokens == fresh.tokens
    assert together.avg_logprob == pytest.approx(fresh.avg_logprob, abs=1e-4)


def test_beams(engine: Engine, speech: Samples, vocabulary: Vocabulary) -> None:
    """A window may use beam search; its text is at least as likely as the greedy one, or nearly."""
    greedy = decode(engine, speech, DecodeRequest())
    found = decode(engine, speech, DecodeRequest(beam_size=3))
    assert found.avg_logprob >= greedy.avg_logprob - 0.1
    assert found.tokens[0] >= vocabulary.timestamp_begin
    assert engine.free_slots == engine.info.slots


def test_cancel_frees_slots(engine: Engine, speech: Samples) -> None:
    """Cancelled windows may come out or not; their slots are free again, and the next window is decoded."""
    n_windows = engine.info.slots
    engine.admit([Window(id=key, samples=speech, request=DecodeRequest()) for key in range(n_windows)])
    engine.cancel(frozenset(range(n_windows)))
    for _ in range(EMPTY_STEPS_MAX):
        engine.step()
        if engine.free_slots == n_windows:
            break
    assert engine.free_slots == n_windows
    assert decode(engine, speech, DecodeRequest()).window_id == 1


@pytest.mark.parametrize("opener", [cramped_fake, cramped_ct2, cramped_child], ids=["fake", "ct2", "ct2 in a process"])
def test_out_of_memory(
    opener: Callable[[Path, Vocabulary, int, ModelMeter], Engine],
    snapshot: Path,
    vocabulary: Vocabulary,
    speech: Samples,
) -> None:
    """A batch that does not fit is halved until it does: every window comes out right, and the next batch fits."""
    meter = Halvings()
    windows = [Window(id=key, samples=speech, request=DecodeRequest(), audio=key) for key in range(6)]
    engine = opener(snapshot, vocabulary, 2, meter)
    try:
        expected = decode(engine, speech, DecodeRequest())
        assert expected.halvings == 0
        engine.admit(windows)
        outcomes = [outcome for outcome in drain(engine, 6).values() if isinstance(outcome, Hypothesis)]
        assert [outcome.tokens for outcome in outcomes] == [expected.tokens] * 6
        halvings = meter.count
        assert halvings >= 1
        assert max(outcome.halvings for outcome in outcomes) >= 1
        engine.admit(windows)
        assert len(drain(engine, 6)) == 6
        assert meter.count == halvings, "what was too much once is not tried again at once"
    finally:
        engine.close()


@pytest.mark.parametrize("opener", [cramped_fake, cramped_ct2, cramped_child], ids=["fake", "ct2", "ct2 in a process"])
def test_no_memory_at_all(
    opener: Callable[[Path, Vocabulary, int, ModelMeter], Engine],
    snapshot: Path,
    vocabulary: Vocabulary,
    speech: Samples,
) -> None:
    """A window that does not fit alone fails as OutOfMemory; the engine continues."""
    engine = opener(snapshot, vocabulary, 0, ModelMeter())
    try:
        engine.admit([Window(id=key, samples=speech, request=DecodeRequest()) for key in range(3)])
        outcomes = drain(engine, 3).values()
        assert all(isinstance(one, WindowFailure) and isinstance(one.error, OutOfMemory) for one in outcomes)
        assert list(engine.step()) == []
    finally:
        engine.close()
