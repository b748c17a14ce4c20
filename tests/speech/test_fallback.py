"""Whisper's safeguards, one window at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.speech.fallback import (
    Attempt,
    Options,
    best,
    compression_ratio,
    failure,
    is_echo,
    is_silence,
    next_temperature,
)

GOOD = Attempt(avg_logprob=-0.3, compression_ratio=1.4, no_speech_prob=0.1, temperature=0.0)
attempts = st.builds(
    Attempt,
    avg_logprob=st.floats(-5, 0),
    compression_ratio=st.floats(0.1, 20),
    no_speech_prob=st.floats(0, 1),
    temperature=st.sampled_from([0.0, 0.2, 1.0]),
    looped=st.booleans(),
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, None, id="good"),
        pytest.param({"compression_ratio": 2.5}, "compression_ratio", id="loop"),
        pytest.param({"looped": True}, "loop", id="broken off"),
        pytest.param({"avg_logprob": -1.1}, "avg_logprob", id="unsure"),
        pytest.param({"past_audio_s": 16.8}, "end_past_audio", id="lost its place"),
        pytest.param({"past_audio_s": 0.6}, None, id="rounds up"),
        pytest.param({"avg_logprob": -1.1, "no_speech_prob": 0.7}, None, id="silence needs no retry"),
        pytest.param({"compression_ratio": 9.0, "no_speech_prob": 0.7}, "compression_ratio", id="sure of its loop"),
    ],
)
def test_safeguards(change: dict[str, Any], expected: str | None) -> None:
    """Each safeguard is triggered by its own figure, and silence is not decoded again."""
    assert failure(replace(GOOD, **change), Options()) == expected


@given(attempts)
def test_thresholds_of_none_accept_everything(attempt: Attempt) -> None:
    """With all thresholds off no attempt fails and no window is silence."""
    off = Options(compression_ratio_threshold=None, log_prob_threshold=None, no_speech_threshold=None)
    whole = replace(attempt, looped=False)  # without a threshold no engine stops a text early
    assert failure(whole, off) is None
    assert not is_silence(attempt, off)


@given(st.lists(attempts, min_size=1, max_size=6))
def test_the_best_attempt_does_not_loop_if_any_does_not(tried: list[Attempt]) -> None:
    """A looping attempt is kept only when all of them loop, and then the most probable one."""
    chosen = tried[best(tried, Options())]
    sane = [attempt for attempt in tried if attempt.compression_ratio <= 2.4 and not attempt.looped]
    assert chosen.avg_logprob == max(attempt.avg_logprob for attempt in sane or tried)
    assert not sane or chosen in sane


def test_the_ladder_ends() -> None:
    """After as many attempts as there are temperatures there is no further one."""
    options = Options(temperatures=(0.0, 0.5))
    assert [next_temperature(n, options) for n in range(3)] == [0.0, 0.5, None]


def test_repetition_compresses_well() -> None:
    """A loop has a ratio far above the threshold, a sentence one below it."""
    assert compression_ratio("the second is the second is " * 10) > 2.4
    assert compression_ratio("They have been carried away by monkeys.") < 2.4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Kubernetes, Grafana, Terraform.", True),
        (" grafana", True),
        (" Kubernetes and Grafana", False),
        (" asked the engineer.", True),
        (" He asked the engineer. And then", False),
        ("", False),
        (" ...", False),
    ],
)
def test_echo(text: str, expected: bool) -> None:
    """A text of nothing but hotwords, or a part of the prompt, is an echo."""
    options = Options(hotwords=("Kubernetes", "Grafana Terraform"), prompt='"Why?", asked the engineer.')
    assert is_echo(text, options) == expected
    assert not is_echo(text, Options())
