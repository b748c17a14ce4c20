"""The tokens that a row may write next are those that transformers' processors allow, on any logits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.generation import logits_process

from whisperd.engine.cuda.rows import RowPlan, Rows
from whisperd.engine.cuda.rules import TokenRules

CPU = torch.device("cpu")
# a small vocabulary with the order of the real ones: text, the end, ids that steer the model, timestamps
SIZE, EOT, SOT, NO_TIMESTAMPS = 200, 60, 61, 70
BEGIN = NO_TIMESTAMPS + 1
SUPPRESSED, SUPPRESSED_FIRST = (1, 2, 7, SOT, 62), (5, EOT)
N_STEPS = 12


@pytest.fixture(scope="module")
def rules() -> TokenRules:
    return TokenRules(
        size=SIZE,
        eot=EOT,
        no_timestamps=NO_TIMESTAMPS,
        suppressed=SUPPRESSED,
        suppressed_first=SUPPRESSED_FIRST,
        device=CPU,
    )


def allowed_by_transformers(tokens: list[int], logits: Any, *, timestamps: bool) -> Any:
    """float32 [vocabulary] after the processors that ``generate`` applies to Whisper."""
    ids = torch.tensor([[SOT, *tokens]])
    processors = [
        logits_process.SuppressTokensAtBeginLogitsProcessor(SUPPRESSED_FIRST, begin_index=1),
        logits_process.SuppressTokensLogitsProcessor(SUPPRESSED),
    ]
    if timestamps:
        config = transformers.GenerationConfig(
            no_timestamps_token_id=NO_TIMESTAMPS, eos_token_id=EOT, bos_token_id=EOT, max_initial_timestamp_index=50
        )
        processors.append(logits_process.WhisperTimeStampLogitsProcessor(config, begin_index=1))
    scores = logits[None]
    for process in processors:
        scores = process(ids, scores)
    return scores[0]


def drawn_logits(generator: Any, n_rows: int) -> Any:
    """Random ones in which text, timestamps or the end are likelier by turns."""
    logits = torch.randn(n_rows, SIZE, generator=generator) * 3
    logits[:, BEGIN:] += torch.randn(n_rows, 1, generator=generator) * 4
    logits[:, EOT] += torch.randn(n_rows, generator=generator) * 2
    return logits


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    timestamps=st.lists(st.booleans(), min_size=1, max_size=5),
    floors=st.integers(0, 4),
)
def test_rules(rules: TokenRules, seed: int, timestamps: list[bool], floors: int) -> None:
    """Rows of one batch may write what each alone may by the reference, at every step of their texts."""
    generator = torch.Generator().manual_seed(seed)
    rows = Rows(len(timestamps), eot=EOT, timestamp_begin=BEGIN, device=CPU)
    at = torch.arange(len(timestamps))
    plans = [RowPlan(prefix=(SOT,), timestamps=timed, min_tokens=floors) for timed in timestamps]
    rows.begin(at, [0] * len(plans), plans)
    texts: list[list[int]] = [[] for _ in plans]
    sums = [0.0] * len(plans)
    for _ in range(N_STEPS):
        logits = drawn_logits(generator, len(plans))
        ended = rows.done.tolist()
        mine = rules(logits, rows.history(at))
        rows.write(at, logits, rules, sampled=False)
        for row, plan in enumerate(plans):
            if ended[row]:
                continue
            if len(texts[row]) < floors:
                logits[row, EOT] = float("-inf")
            expected = allowed_by_transformers(texts[row], logits[row], timestamps=plan.timestamps)
            assert torch.equal(mine[row], expected)
            best = int(expected.argmax())
            sums[row] += float(expected.log_softmax(dim=-1)[best])
            texts[row] += [] if best == EOT else [best]
            assert bool(rows.done[row]) == (best == EOT)
    for text, tokens, total in zip(rows.texts(at), texts, sums, strict=True):
        assert text.tokens == tuple(tokens)
        assert text.sum_logprob == pytest.approx(total, abs=1e-3)


@given(length=st.integers(1, 20), timestamps=st.booleans())
def test_forced_lengths(rules: TokenRules, length: int, timestamps: bool) -> None:
    """Equal limits give a text of that length, whatever the logits say."""
    rows = Rows(1, eot=EOT, timestamp_begin=BEGIN, device=CPU)
    at = torch.tensor([0])
    rows.begin(at, [0], [RowPlan(prefix=(SOT,), timestamps=timestamps, min_tokens=length, max_tokens=length)])
    generator = torch.Generator().manual_seed(length)
    for _ in range(25):
        rows.write(at, drawn_logits(generator, 1), rules, sampled=False)
    assert len(rows.texts(at)[0].tokens) == length


def test_sampling_follows_the_probabilities(rules: TokenRules) -> None:
    """Drawn tokens come as often as the softmax at their temperature says; greedy rows beside them stay greedy."""
    n_rows, temperature = 4000, 0.7
    torch.manual_seed(3)
    logits = torch.full((n_rows, SIZE), -50.0)
    logits[:, 10:14] = torch.tensor([1.0, 0.5, 0.0, -1.0])
    rows = Rows(n_rows, eot=EOT, timestamp_begin=BEGIN, device=CPU)
    at = torch.arange(n_rows)
    plan = RowPlan(prefix=(SOT,), timestamps=False, temperature=temperature)
    greedy = RowPlan(prefix=(SOT,), timestamps=False)
    rows.begin(at, [0] * n_rows, [greedy, *[plan] * (n_rows - 1)])
    rows.write(at, logits, rules, sampled=True)
    picked = torch.tensor([text.tokens[0] for text in rows.texts(at)])
    shares = torch.bincount(picked[1:], minlength=SIZE)[10:14] / (n_rows - 1)
    expected = (torch.tensor([1.0, 0.5, 0.0, -1.0]) / temperature).softmax(dim=-1)
    assert int(picked[0]) == 10
    assert (shares - expected).abs().max() < 0.03
