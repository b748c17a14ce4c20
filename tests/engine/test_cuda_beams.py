"""Beam search on the engine for GPUs gives the texts of openai-whisper's search, whatever else is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_contract import decode, drain
from tests.engine.test_cuda_engine import CPU, audio, opened, talkative
from tests.support.speech import Clip
from whisperd.engine.base import DecodeRequest, Hypothesis, Window, WindowFailure
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import SAMPLE_RATE_HZ

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda.engine import CudaEngine
from whisperd.engine.cuda.rows import RowPlan, Rows
from whisperd.engine.cuda.runner import Runner

torch.set_num_threads(1)
MAX_TOKENS = 40
Found = list[tuple[tuple[int, ...], float]]


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Vocabulary) -> Checkpoint:
    return talkative(vocabulary)


@pytest.fixture(scope="module")
def runner(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Iterator[Runner]:
    runner = Runner(checkpoint, vocabulary, device=CPU, dtype=torch.float32, slots=12)
    runner.encode([audio(key) for key in range(3)], [0, 1, 2])
    yield runner
    runner.close()


def logprobs(runner: Runner, vocabulary: Vocabulary, window: int, texts: list[list[int]], prefix: list[int]) -> Any:
    """The scores of the next token of each text, computed from its start; float32 [texts, vocabulary]."""
    at = torch.arange(len(texts))
    rows = Rows(len(texts), eot=vocabulary.eot, timestamp_begin=vocabulary.timestamp_begin, device=CPU)
    rows.begin(at, [window] * len(texts), [RowPlan(prefix=tuple(prefix))] * len(texts))
    for place in range(len(texts[0])):
        rows.extend(at, torch.tensor([text[place] for text in texts]), torch.ones(len(texts), dtype=torch.bool))
    tokens = torch.tensor([prefix + text for text in texts])
    windows = torch.full_like(at, window)
    with torch.inference_mode():
        states, _ = runner.decoder(tokens, torch.zeros_like(at), at, windows, tokens.shape[1])
        return runner.rules(runner.decoder.logits(states[:, -1]), rows.history(at)).log_softmax(dim=-1)


def searched(runner: Runner, vocabulary: Vocabulary, window: int, n_beams: int) -> Found:
    """openai-whisper's ``BeamSearchDecoder`` with patience 1, step by step: finished texts with their sums."""
    prefix = list(vocabulary.start("transcribe", "en"))
    texts: list[tuple[int, ...]] = [()] * n_beams
    sums = [0.0] * n_beams
    finished: dict[tuple[int, ...], float] = {}
    for _ in range(MAX_TOKENS):
        found = logprobs(runner, vocabulary, window, [list(text) for text in texts], prefix)
        scores: dict[tuple[int, ...], float] = {}
        for text, total, row in zip(texts, sums, found, strict=True):
            for logprob, token in zip(*row.topk(n_beams + 1), strict=True):
                scores[*text, int(token)] = total + float(logprob)
        texts, sums, ended = [], [], {}
        for sequence in sorted(scores, key=scores.__getitem__, reverse=True):
            if sequence[-1] == vocabulary.eot:
                ended[sequence[:-1]] = scores[sequence]
                continue
            texts.append(sequence)
            sums.append(scores[sequence])
            if len(texts) == n_beams:
                break
        for sequence in sorted(ended, key=ended.__getitem__, reverse=True):
            if len(finished) < n_beams:
                finished[sequence] = ended[sequence]
        if len(finished) >= n_beams:
            break
    for total, text in sorted(zip(sums, texts, strict=True), reverse=True):
        if len(finished) < n_beams:
            finished[text] = total
    return list(finished.items())


@pytest.mark.parametrize("n_beams", [2, 5])
def test_as_openai_whisper(runner: Runner, vocabulary: Vocabulary, n_beams: int) -> None:
    """All texts of a search and their sums, for groups that are searched side by side and end at different times."""
    expected = [searched(runner, vocabulary, window, n_beams) for window in (0, 1)]
    groups = [list(range(n_beams)), [11 - row for row in range(n_beams)]]
    plan = RowPlan(prefix=tuple(vocabulary.start("transcribe", "en")), max_tokens=MAX_TOKENS)
    for window, group in enumerate(groups):
        runner.begin_beams(group, window, plan)
    for _ in range(MAX_TOKENS // 4):
        runner.decode_beams(groups, 4)
    for group, wanted in zip(groups, expected, strict=True):
        assert runner.progress(group)[0] == group
        found = runner.beam_texts(group)
        assert [text.tokens for text in found] == [tokens for tokens, _ in wanted]
        assert [text.sum_logprob for text in found] == pytest.approx([total for _, total in wanted], abs=1e-3)


def test_in_company(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Searches of different widths, greedy windows and samples share the engine, and no text changes another."""
    requests = [
        DecodeRequest(beam_size=2, word_timestamps=True),
        DecodeRequest(),
        DecodeRequest(beam_size=5),
        DecodeRequest(beam_size=2, prompt_tokens=(100, 101, 102)),
    ]
    windows = [Window(id=key, samples=audio(key % 3), request=request) for key, request in enumerate(requests)]
    engine = opened(checkpoint, vocabulary, 5)
    alone = []
    for window in windows:
        engine.admit([window])
        alone.append(drain(engine, 1)[window.id])
    assert all(isinstance(one, Hypothesis) and one.temperature == 0 for one in alone)
    noisy = replace(windows[0], id=9, request=DecodeRequest(temperature=0.5, best_of=3, beam_size=5))
    engine.admit([*windows, noisy])
    together = drain(engine, 5)
    assert [getattr(together[key], "tokens", None) for key in range(4)] == [getattr(one, "tokens", 0) for one in alone]
    assert getattr(together[0], "alignment", None)
    assert engine.free_slots == 5
    engine.close()


def test_more_beams_than_rows(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """A search that can never start fails with advice on what to change, and its slot is freed."""
    engine = opened(checkpoint, vocabulary, 2)
    request = DecodeRequest()
    engine.admit([Window(id=1, samples=audio(1), request=DecodeRequest(beam_size=3))])
    engine.admit([Window(id=2, samples=audio(2), request=request)])
    assert engine.free_slots == 0
    outcomes = drain(engine, 2)
    failure = outcomes[1]
    assert isinstance(failure, WindowFailure)
    assert "beam_size must be at most 2" in str(failure.error)
    assert isinstance(outcomes[2], Hypothesis)
    assert engine.free_slots == 2
    engine.close()


@pytest.mark.parametrize("name", ["agent", "monkeys"])
def test_as_ctranslate2(snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip], name: str) -> None:
    """On real weights and real speech, five beams give CTranslate2's text."""
    speech = clips[name].samples()[: 12 * SAMPLE_RATE_HZ]
    request = DecodeRequest(beam_size=5)
    mine = CudaEngine.load(snapshot, vocabulary, device="cpu", slots=5)
    found = decode(mine, speech, request)
    mine.close()
    theirs = Ct2Engine.load(snapshot, vocabulary, compute_type="float32", batch_size=1, workers=1, threads_per_worker=1)
    expected = decode(theirs, speech, request)
    theirs.close()
    assert found.tokens == expected.tokens
    assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
