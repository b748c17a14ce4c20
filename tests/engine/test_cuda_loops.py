"""Texts that repeat themselves are stopped early when, and only when, the safeguards would refuse them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_contract import drain
from tests.engine.test_cuda_engine import CPU, audio, opened, talkative
from tests.support.speech import Clip
from whisperd.engine.base import DecodeRequest, Hypothesis, Window
from whisperd.speech.fallback import compression_ratio
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.cuda.engine import CudaEngine
from whisperd.engine.cuda.rules import PERIOD_MAX_TOKENS, REPEATED_MIN_TOKENS, ROUNDS_MIN, Loops

TIME = 1000  # stands for any timestamp
THRESHOLD = 2.4
NEVER = 1e9


def repeats(text: list[int]) -> bool:
    """The definition: a text that ends in enough repetitions, with enough tokens in all."""
    for period in range(1, PERIOD_MAX_TOKENS + 1):
        n_tokens = max(ROUNDS_MIN * period, REPEATED_MIN_TOKENS)
        end = text[-n_tokens:]
        if len(end) == n_tokens and end[period:] == end[:-period]:
            return True
    return False


phrases = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=45), st.integers(1, 60))


@settings(max_examples=60)
@given(texts=st.lists(st.lists(phrases, min_size=1, max_size=3), min_size=1, max_size=4), every=st.integers(2, 9))
def test_loops(texts: list[list[tuple[list[int], int]]], every: int) -> None:
    """Rows of any rhythm, with timestamps between, and each at its own position, are classified by the definition."""
    written = [[token for phrase, rounds in parts for token in phrase * rounds][:150] for parts in texts]
    loops = Loops(9, CPU)
    rows = torch.tensor([7, 0, 3, 5][: len(written)])
    loops.begin(rows)
    for at in range(max(map(len, written))):
        there = torch.tensor([at < len(tokens) for tokens in written])
        tokens = torch.tensor([[*tokens, *[0] * 150][at] for tokens in written])
        loops.append(rows, tokens, there)
        if at % every == 0:
            loops.append(rows, torch.full_like(rows, TIME + at), torch.zeros_like(there))
        expected = [repeats(tokens[: at + 1]) for tokens in written]
        assert loops.going(rows).tolist() == expected
    loops.begin(rows)
    assert not loops.going(rows).any()


def decoded(engine: CudaEngine, windows: list[Window]) -> dict[int, Hypothesis]:
    engine.admit(windows)
    outcomes = drain(engine, len(windows))
    return {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Hypothesis)}


def with_limit(window: Window, limit: float | None) -> Window:
    return replace(window, request=replace(window.request, compression_ratio_threshold=limit))


def test_a_loop_ends_early(vocabulary: Vocabulary) -> None:
    """Random weights loop: a stopped text is a prefix of the whole one and fails; its row is reused."""
    found = talkative(vocabulary)
    embeddings = found.tensors["model.decoder.embed_tokens.weight"]
    engine = opened(replace(found, tensors={**found.tensors, "model.decoder.embed_positions.weight": np.zeros(
        (found.shape.positions, embeddings.shape[1]), np.float32)}), vocabulary, 3)  # fmt: skip
    windows = [Window(id=key, samples=audio(key), request=DecodeRequest()) for key in range(4)]
    whole = decoded(engine, windows)
    patient = decoded(engine, [with_limit(window, NEVER) for window in windows])
    hasty = decoded(engine, [with_limit(window, THRESHOLD) for window in windows])
    stopped = [key for key in whole if hasty[key].looped]
    assert stopped, "these weights were chosen because they loop"
    assert {key: one.tokens for key, one in whole.items()} == {key: one.tokens for key, one in patient.items()}
    assert not any(one.looped for one in (*whole.values(), *patient.values()))
    for key in stopped:
        text = hasty[key].tokens
        assert whole[key].tokens[: len(text)] == text
        assert len(text) < len(whole[key].tokens)
        assert compression_ratio(vocabulary.decode(text)) > THRESHOLD
    assert engine.free_slots == 3
    engine.close()


def test_real_speech_is_never_broken_off(snapshot: object, vocabulary: Vocabulary, clips: dict[str, Clip]) -> None:
    """No good speech is stopped; where the model loops, only what fails as a whole is stopped."""
    speech = clips["instruct"].samples()[: 20 * SAMPLE_RATE_HZ]
    sounds = [speech, np.repeat(speech, 2)[: 30 * SAMPLE_RATE_HZ], clips["agent"].samples()]
    engine = CudaEngine.load(snapshot, vocabulary, device="cpu", slots=3)  # type: ignore[arg-type]
    windows = [Window(id=key, samples=samples, request=DecodeRequest()) for key, samples in enumerate(sounds)]
    whole = decoded(engine, windows)
    hasty = decoded(engine, [with_limit(window, THRESHOLD) for window in windows])
    for key, one in whole.items():
        assert hasty[key].looped or hasty[key].tokens == one.tokens
        assert not hasty[key].looped or compression_ratio(vocabulary.decode(one.tokens)) > THRESHOLD
    assert [hasty[key].looped for key in range(3)] == [False, True, False], "at half speed this model loops"
    engine.close()
