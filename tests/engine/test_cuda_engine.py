"""Slots, rows and languages of the engine for GPUs, on small random weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.random_whisper import SHAPES, drawn
from tests.engine.test_contract import drain
from tests.speech.test_tokenizer import multilingual
from tests.support.speech import noise
from whisperd.engine.base import DecodeRequest, Hypothesis, Lane, Outcome, Window, WindowFailure
from whisperd.errors import EngineError, OutOfMemory
from whisperd.speech.features import LogMel
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import Samples

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.checkpoints import Checkpoint, Shape
from whisperd.engine.cuda.engine import CudaEngine
from whisperd.engine.cuda.rows import RowPlan, RowText
from whisperd.engine.cuda.runner import Runner

torch.set_num_threads(1)  # on tensors this small several threads wait for each other more than they compute
CPU = torch.device("cpu")
N_WINDOWS = 5
SPREAD = 0.3  # large enough that audio, position and history change what comes next
END_GROWTH = 0.7  # the weight of the end token at each position, so that texts end, and at different lengths


def talkative(vocabulary: Vocabulary, shape: Shape = SHAPES["smoke"]) -> Checkpoint:
    """Random weights whose texts end."""
    found = drawn(replace(shape, vocabulary_size=vocabulary.size), seed=1, spread=SPREAD)
    tensors = dict(found.tensors)
    end = tensors["model.decoder.embed_tokens.weight"][vocabulary.eot]
    places = np.arange(found.shape.positions, dtype=np.float32)[:, None]
    name = "model.decoder.embed_positions.weight"
    tensors[name] = tensors[name] + END_GROWTH * places * end
    return replace(found, tensors=tensors)


def opened(found: Checkpoint, vocabulary: Vocabulary, slots: int) -> CudaEngine:
    runner = Runner(found, vocabulary, device=CPU, dtype=torch.float32, slots=slots)
    return CudaEngine(runner, vocabulary, compute_type="float32")


@functools.cache
def audio(key: int) -> Samples:
    """A different sound for each number."""
    seconds = 1.0 + 3.5 * key
    return noise(seconds, level=0.02 * (key + 1)) * np.sin(np.arange(round(seconds * 16000)) / (20 + 7 * key)).astype(
        np.float32
    )


def window(key: int) -> Window:
    request = DecodeRequest(prompt_tokens=tuple(range(100, 100 + 7 * (key % 3))), word_timestamps=key % 2 == 0)
    return Window(id=key, samples=audio(key), request=request)


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Vocabulary) -> Checkpoint:
    return talkative(vocabulary)


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint, vocabulary: Vocabulary) -> list[Hypothesis]:
    """Each window on an engine that holds nothing else."""
    engine = opened(checkpoint, vocabulary, 1)
    found = []
    for key in range(N_WINDOWS):
        engine.admit([window(key)])
        outcome = drain(engine, 1)[key]
        assert isinstance(outcome, Hypothesis)
        found.append(outcome)
    engine.close()
    return found


@pytest.fixture(scope="module")
def engines(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Iterator[dict[int, CudaEngine]]:
    found = {slots: opened(checkpoint, vocabulary, slots) for slots in (1, 2, 3, 5)}
    yield found
    for engine in found.values():
        engine.close()


def test_texts_differ(alone: Sequence[Hypothesis]) -> None:
    """The test weights give texts of different lengths that depend on the audio."""
    assert len({len(one.tokens) for one in alone}) > 3
    assert len({one.tokens for one in alone}) == N_WINDOWS


@settings(max_examples=6)
@given(
    order=st.permutations(range(N_WINDOWS)),
    turns=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    slots=st.sampled_from([1, 2, 3, 5]),
)
def test_any_order(
    engines: dict[int, CudaEngine], alone: Sequence[Hypothesis], order: list[int], turns: list[int], slots: int
) -> None:
    """Whenever windows join and whatever is decoded beside them, each gives the text that it gives alone."""
    engine = engines[slots]
    waiting = [window(key) for key in order]
    arrivals = iter(turns)
    outcomes: list[Outcome] = []
    while len(outcomes) < N_WINDOWS:
        joining = min(next(arrivals, N_WINDOWS), engine.free_slots)
        engine.admit(waiting[:joining])
        waiting = waiting[joining:]
        outcomes.extend(engine.step())
    assert engine.free_slots == slots
    for outcome in outcomes:
        assert isinstance(outcome, Hypothesis)
        expected = alone[outcome.window_id]
        assert (outcome.tokens, outcome.alignment is None) == (expected.tokens, expected.alignment is None)
        assert outcome.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-4)
        assert outcome.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)


def test_cancel_gives_rows_back(checkpoint: Checkpoint, vocabulary: Vocabulary, alone: Sequence[Hypothesis]) -> None:
    """Windows that are cancelled during decoding free their slots and rows for the next ones."""
    engine = opened(checkpoint, vocabulary, 2)
    engine.admit([window(0), window(3)])
    engine.step()
    engine.cancel(frozenset({0, 3}))
    assert engine.free_slots == 2
    engine.admit([window(1), window(2)])
    outcomes = drain(engine, 2)
    assert [getattr(outcomes[key], "tokens", None) for key in (1, 2)] == [alone[key].tokens for key in (1, 2)]
    engine.close()


def test_best_of_needs_no_free_rows(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Samples of one window take turns where there are fewer rows than samples, and the likeliest is kept."""
    engine = opened(checkpoint, vocabulary, 2)
    request = DecodeRequest(temperature=0.3, best_of=5)
    engine.admit([Window(id=key, samples=audio(key), request=request) for key in range(2)])
    outcomes = drain(engine, 2)
    assert all(isinstance(outcome, Hypothesis) and outcome.temperature == 0.3 for outcome in outcomes.values())
    assert engine.free_slots == 2
    engine.close()


class ListeningRunner(Runner):
    """Records how likely each text was."""

    def texts(self, rows: Sequence[int]) -> list[RowText]:
        found = super().texts(rows)
        self.scores = [*getattr(self, "scores", []), *(one.sum_logprob / (len(one.tokens) + 1) for one in found)]
        return found


def test_the_likeliest_sample_is_kept(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Of four different samples the best becomes the hypothesis."""
    runner = ListeningRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=3)
    engine = CudaEngine(runner, vocabulary, compute_type="float32")
    engine.admit([Window(id=1, samples=audio(2), request=DecodeRequest(temperature=0.3, best_of=4))])
    outcome = drain(engine, 1)[1]
    assert isinstance(outcome, Hypothesis)
    assert len(set(runner.scores)) == 4
    assert outcome.avg_logprob == max(runner.scores)
    engine.close()


class NotingRunner(Runner):
    """Records which audio came in, by its length, in order."""

    def encode(self, samples: Sequence[Samples], windows: Sequence[int], keys: Sequence[int] | None = None) -> None:
        self.lengths = [*getattr(self, "lengths", []), *map(len, samples)]
        super().encode(samples, windows, keys)


def test_the_order_of_admission(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """The oldest window is admitted first, then interactive ones, then the others."""
    runner = NotingRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=4)
    engine = CudaEngine(runner, vocabulary, compute_type="float32")
    lanes: list[Lane] = ["bulk", "bulk", "interactive", "interactive"]
    engine.admit([replace(window(key), lane=lane) for key, lane in enumerate(lanes)])
    drain(engine, 4)
    assert runner.lengths == [len(audio(key)) for key in (0, 2, 3, 1)]
    engine.close()


def test_a_free_row_has_its_next_window(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Windows that wait inside take a row in the step after it was freed, without another ``admit``."""
    runner = NotingRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=2)
    engine = CudaEngine(runner, vocabulary, compute_type="float32", ahead=2)
    assert engine.free_slots == engine.info.slots == 4
    engine.admit([window(key) for key in range(4)])
    while not (outcomes := engine.step()):
        assert len(runner.lengths) == 2
    engine.step()
    assert len(runner.lengths) == 2 + len(outcomes)
    drain(engine, 4 - len(outcomes))
    engine.close()


def decoded(engine: CudaEngine, windows: Sequence[Window]) -> dict[int, Outcome]:
    engine.admit(windows)
    return drain(engine, len(windows))


def again(key: int) -> Window:
    """The first and every further decoding of the same audio look the same, but for their id."""
    return replace(window(key), audio=key)


def test_a_retry_keeps_its_slot(checkpoint: Checkpoint, vocabulary: Vocabulary, alone: Sequence[Hypothesis]) -> None:
    """Encoded audio is kept until its slot is needed; the slot whose window left first is reused first."""
    runner = NotingRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=3)
    engine = CudaEngine(runner, vocabulary, compute_type="float32")
    decoded(engine, [again(0), again(1)])
    second = decoded(engine, [window(2), again(1), again(0)])
    assert runner.lengths == [len(audio(key)) for key in (0, 1, 2)]
    assert [getattr(second[key], "tokens", None) for key in range(3)] == [alone[key].tokens for key in range(3)]
    decoded(engine, [again(0)])
    decoded(engine, [window(3), window(4)])  # audio 0 was used last
    decoded(engine, [again(0), again(1)])
    assert runner.lengths == [len(audio(key)) for key in (0, 1, 2, 3, 4, 1)]
    engine.close()


def test_under_load_audio_is_kept_for_a_while(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Where all rows are busy all the time, the audio of a window that comes again soon is still kept."""
    runner = NotingRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=8)
    engine = CudaEngine(runner, vocabulary, compute_type="float32")
    assert (runner.windows, engine.free_slots) == (9, 8)
    engine.admit([replace(window(1), id=key, audio=key) for key in range(8)])
    gone: list[int] = []
    while not gone:
        gone = [outcome.window_id for outcome in engine.step()]
    first = gone[-1]
    engine.admit([replace(window(2), id=100)])
    engine.step()
    engine.cancel(frozenset(range(8)) - {first})
    decoded(engine, [replace(window(1), id=first, audio=first)])
    assert len(runner.lengths) == 9
    engine.close()


class SmallRunner(Runner):
    """A device whose memory holds the encoding of so many windows."""

    room = 2

    def encode(self, samples: Sequence[Samples], windows: Sequence[int], keys: Sequence[int] | None = None) -> None:
        if len(samples) > self.room:
            raise OutOfMemory("the device is full")
        super().encode(samples, windows, keys)


def test_out_of_memory_halves(checkpoint: Checkpoint, vocabulary: Vocabulary, alone: Sequence[Hypothesis]) -> None:
    """Too many windows at once are retried by halves, in their order, and all are decoded."""
    runner = SmallRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=N_WINDOWS)
    engine = CudaEngine(runner, vocabulary, compute_type="float32")
    engine.admit([window(key) for key in range(N_WINDOWS)])
    outcomes = drain(engine, N_WINDOWS)
    assert [getattr(outcomes[key], "tokens", None) for key in range(N_WINDOWS)] == [one.tokens for one in alone]
    engine.close()


def test_a_window_that_does_not_fit_fails_alone(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """A window that cannot be encoded alone fails, and the engine continues."""
    runner = SmallRunner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=2)
    runner.room = 0
    engine = CudaEngine(runner, vocabulary, compute_type="float32")
    engine.admit([window(1), window(2)])
    outcomes = drain(engine, 2)
    assert all(isinstance(one, WindowFailure) and isinstance(one.error, OutOfMemory) for one in outcomes.values())
    runner.room = 2
    engine.admit([window(1)])
    assert isinstance(drain(engine, 1)[1], Hypothesis)
    engine.close()


def test_int8_is_for_the_cpu(snapshot: Path, vocabulary: Vocabulary) -> None:
    """A number format of the other engine is refused with those that this one has."""
    with pytest.raises(EngineError, match=r"int8.*float16"):
        CudaEngine.load(snapshot, vocabulary, device="cpu", compute_type="int8")


@pytest.fixture(scope="module")
def many_languages(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return multilingual(snapshot, tmp_path_factory.mktemp("multilingual"))


def reference(found: Checkpoint, vocabulary: Vocabulary) -> Any:
    """The same weights in transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = found.shape
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocabulary.eot)
    config = transformers.WhisperConfig(
        vocab_size=shape.vocabulary_size,
        d_model=shape.width,
        num_mel_bins=shape.n_mels,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.encoder_heads,
        decoder_attention_heads=shape.decoder_heads,
        encoder_ffn_dim=shape.hidden,
        decoder_ffn_dim=shape.hidden,
        decoder_start_token_id=vocabulary.sot,
        **ends,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in found.tensors.items()}, strict=False)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": token for code, token in vocabulary.languages.items()},
        task_to_id={"transcribe": vocabulary.transcribe, "translate": vocabulary.translate},
        no_timestamps_token_id=vocabulary.no_timestamps,
        decoder_start_token_id=vocabulary.sot,
        max_length=448,
        **ends,
    )
    return model


def test_languages(many_languages: Vocabulary) -> None:
    """A multilingual model detects the languages that transformers detects, and translates as it does."""
    found = talkative(many_languages)
    model = reference(found, many_languages)
    runner = Runner(found, many_languages, device=CPU, dtype=torch.float32, slots=3)
    runner.encode([audio(key) for key in range(3)], [0, 1, 2])
    codes = tuple(many_languages.languages)
    heard = runner.detect([0, 1, 2], [2, 0, 1], tuple(many_languages.languages.values()))
    plan = RowPlan(
        prefix=(*many_languages.start("translate", "fr"), many_languages.no_timestamps), timestamps=False, max_tokens=30
    )
    runner.begin([0, 1, 2], [0, 1, 2], [plan] * 3)
    runner.decode([0, 1, 2], 30)
    for key, (text, probabilities) in enumerate(zip(runner.texts([0, 1, 2]), heard, strict=True)):
        features = torch.from_numpy(LogMel(80)(audio(key)))[None]
        assert sum(probabilities) == pytest.approx(1.0)
        likeliest = codes[int(np.argmax(probabilities))]
        assert int(model.detect_language(features)[0]) == many_languages.languages[likeliest]
        expected = model.generate(features, language="fr", task="translate", max_new_tokens=30)[0].tolist()
        assert list(text.tokens) == [token for token in expected if token != many_languages.eot][: len(text.tokens)]
    runner.close()


class HearingRunner(NotingRunner):
    """Counts questions for the language."""

    asked = 0

    def detect(self, windows: Sequence[int], rows: Sequence[int], languages: Sequence[int]) -> list[list[float]]:
        self.asked += len(windows)
        return super().detect(windows, rows, languages)


def test_a_language_is_detected_once(many_languages: Vocabulary) -> None:
    """Audio that comes again keeps its language, also among fewer candidates; a slot's next audio does not get it."""
    runner = HearingRunner(talkative(many_languages), many_languages, device=CPU, dtype=torch.float32, slots=1)
    engine = CudaEngine(runner, many_languages, compute_type="float32")
    first, second = (getattr(decoded(engine, [again(0)])[0], "language", "") for _ in range(2))
    few = replace(again(0), request=DecodeRequest(languages=("de", "fr")))
    third = getattr(decoded(engine, [few])[0], "language", "")
    assert first == second
    assert third in {"de", "fr"}
    assert (runner.asked, len(runner.lengths)) == (1, 1)
    decoded(engine, [again(1)])
    assert (runner.asked, len(runner.lengths)) == (2, 2)
    engine.close()


def test_a_language_is_found(many_languages: Vocabulary) -> None:
    """The engine detects a language that was not given, keeps a given one, and reports the probability."""
    engine = opened(talkative(many_languages), many_languages, 3)
    engine.admit(
        [Window(id=key, samples=audio(key), request=DecodeRequest(language="de" if key else None)) for key in (0, 1)]
    )
    outcomes = drain(engine, 2)
    detected, asked = outcomes[0], outcomes[1]
    assert isinstance(detected, Hypothesis)
    assert isinstance(asked, Hypothesis)
    assert detected.language in many_languages.languages
    assert detected.language_probability < 1.0
    assert (asked.language, asked.language_probability) == ("de", 1.0)
    engine.close()
