"""When a decoded window is good enough, and what to do when it is not. Pure.

The thresholds and the temperature ladder are those of Radford et al., "Robust Speech Recognition via Large-Scale Weak
Supervision" (2022), section 4.5, as in openai-whisper's ``decode_with_fallback``. Here they are applied to each window
on its own, so a batch loses none of them: a window that fails is queued again, alone, at the next temperature.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from whisperd.transcript import Task

Reason = Literal["compression_ratio", "avg_logprob"]

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How one request is decoded.

    ``temperatures`` is the ladder of attempts. A threshold of None switches that test off. ``prompt`` is text that
    every window sees as if it had been said before.
    """

    task: Task = "transcribe"
    language: str | None = None
    prompt: str | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    beam_size: int = 1
    best_of: int = 5
    word_timestamps: bool = False
    compression_ratio_threshold: float | None = 2.4
    log_prob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The figures of one decoding of one window. ``compression_ratio`` is bytes of text over bytes after zlib."""

    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    temperature: float


def compression_ratio(text: str) -> float:
    """How repetitive a text is: UTF-8 bytes over zlib bytes. Above 2.4 Whisper takes it for a loop."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


def is_silence(attempt: Attempt, options: Options) -> bool:
    """True where the model itself says that nobody speaks: a high no-speech probability and an unsure text."""
    if options.no_speech_threshold is None or attempt.no_speech_prob <= options.no_speech_threshold:
        return False
    return options.log_prob_threshold is None or attempt.avg_logprob <= options.log_prob_threshold


def failure(attempt: Attempt, options: Options) -> Reason | None:
    """The first safeguard that the attempt fails, or None when it is good (or silence, which needs no retry)."""
    if is_silence(attempt, options):
        return None
    ratio_limit = options.compression_ratio_threshold
    if ratio_limit is not None and attempt.compression_ratio > ratio_limit:
        return "compression_ratio"
    if options.log_prob_threshold is not None and attempt.avg_logprob < options.log_prob_threshold:
        return "avg_logprob"
    return None


def next_temperature(attempts_made: int, options: Options) -> float | None:
    """The temperature of the next attempt, or None when the ladder is used up."""
    ladder = options.temperatures
    return ladder[attempts_made] if attempts_made < len(ladder) else None


def best(attempts: Sequence[Attempt], options: Options) -> int:
    """Index of the attempt to keep when none is good: the most probable among those that do not loop."""
    limit = options.compression_ratio_threshold

    def rank(index: int) -> tuple[bool, float]:
        attempt = attempts[index]
        return (limit is None or attempt.compression_ratio <= limit, attempt.avg_logprob)

    return max(range(len(attempts)), key=rank)
