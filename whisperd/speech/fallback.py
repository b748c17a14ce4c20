"""When a decoded window is good enough, and what to do when it is not. Pure.

The thresholds and the temperature ladder are those of Radford et al., "Robust Speech Recognition via Large-Scale Weak
Supervision" (2022), section 4.5, as in openai-whisper's ``decode_with_fallback``. Here they are applied to each window
on its own, so a batch loses none of them: a window that fails is queued again, alone, at the next temperature.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from whisperd.speech.transcript import Task

Reason = Literal["loop", "compression_ratio", "avg_logprob", "end_past_audio", "echo"]

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# A last timestamp in the padding means that the model lost its place: it then tends to leave words out. Good windows
# of real speech end at most 1.7 s past their audio (tiny.en, 100 windows), bad ones 10 s and more
LATEST_END_PAST_AUDIO_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How one request is decoded.

    ``temperatures`` is the ladder of attempts. A threshold of None switches that test off. ``prompt`` is text that
    every window sees as if it had been said before; ``hotwords`` stand before it. A ``language`` of None is detected,
    among ``languages`` when there are any.
    """

    task: Task = "transcribe"
    language: str | None = None
    languages: tuple[str, ...] = ()
    prompt: str | None = None
    hotwords: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = TEMPERATURES
    beam_size: int = 1
    best_of: int = 5
    word_timestamps: bool = False
    token_scores: bool = False
    compression_ratio_threshold: float | None = 2.4
    log_prob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The figures of one decoding of one window.

    ``compression_ratio`` is bytes of text over bytes after zlib, the worst of the window and its segments: a loop at
    the end of a long text hides in the ratio of the whole. ``past_audio_s`` says how far behind the end of the audio
    the last timestamp lies. ``looped``: the engine broke it off while it repeated itself.
    """

    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    temperature: float
    past_audio_s: float = 0.0
    looped: bool = False


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
    if attempt.looped:
        return "loop"
    ratio_limit = options.compression_ratio_threshold
    if ratio_limit is not None and attempt.compression_ratio > ratio_limit:
        return "compression_ratio"
    if options.log_prob_threshold is not None and attempt.avg_logprob < options.log_prob_threshold:
        return "avg_logprob"
    return "end_past_audio" if attempt.past_audio_s > LATEST_END_PAST_AUDIO_S else None


def is_echo(text: str, options: Options) -> bool:
    """True for a text that consists of hotwords, or is a part of the prompt.

    That is what a model writes that has a prompt and nothing to listen to. Whoever really says it is understood
    without the prompt too.
    """
    said = _words(text)
    if not said:
        return False
    hotwords = {word for phrase in options.hotwords for word in _words(phrase)}
    prompt = _words(options.prompt or "")
    is_quoted = any(prompt[at : at + len(said)] == said for at in range(len(prompt) - len(said) + 1))
    return is_quoted or hotwords.issuperset(said)


def _words(text: str) -> list[str]:
    """The words of a text without punctuation and case."""
    return re.findall(r"\w+", text.casefold())


def next_temperature(attempts_made: int, options: Options) -> float | None:
    """The temperature of the next attempt, or None when the ladder is used up."""
    ladder = options.temperatures
    return ladder[attempts_made] if attempts_made < len(ladder) else None


def best(attempts: Sequence[Attempt], options: Options) -> int:
    """Index of the attempt to keep when none is good: the most probable among those that look whole."""
    limit = options.compression_ratio_threshold

    def rank(index: int) -> tuple[bool, float]:
        attempt = attempts[index]
        loops = attempt.looped or (limit is not None and attempt.compression_ratio > limit)
        return (not loops and attempt.past_audio_s <= LATEST_END_PAST_AUDIO_S, attempt.avg_logprob)

    return max(range(len(attempts)), key=rank)
