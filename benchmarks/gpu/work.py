"""What systems are given to read: mixes of windows, each with the length that its text is made to have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from whisperd.engine.base import MAX_NEW_TOKENS, DecodeRequest, Window
from whisperd.speech.units import SAMPLE_RATE_HZ

LONGEST_S, LOOPING = 30.0, 0.01  # one window in a hundred runs into a loop
TOKENS_PER_S = 3.3
IDS = itertools.count(1)  # never one twice: an engine may know the audio of an id


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One window to read: its audio, and how many tokens its text is made to have."""

    duration_s: float
    n_tokens: int


Mix = Callable[[np.random.Generator, int], list[Work]]


def packed(generator: np.random.Generator, count: int) -> list[Work]:
    """Windows as a packer of long audio makes them, a few of them loops."""
    durations = np.clip(generator.normal(23.3, 5.0, count), 5, LONGEST_S)
    lengths = np.clip(generator.normal(76, 25, count), 8, 200).astype(int)
    lengths[generator.random(count) < LOOPING] = MAX_NEW_TOKENS
    return [Work(duration_s=float(d), n_tokens=int(n)) for d, n in zip(durations, lengths, strict=True)]


def short(generator: np.random.Generator, count: int) -> list[Work]:
    """Utterances; a text has three tokens and a bit for each second."""
    durations = np.clip(generator.lognormal(np.log(6.0), 0.6, count), 1, LONGEST_S)
    return [Work(duration_s=float(d), n_tokens=int(np.clip(TOKENS_PER_S * d, 2, 200))) for d in durations]


def constant(_: np.random.Generator, count: int) -> list[Work]:
    """The same for all."""
    return [Work(duration_s=23.3, n_tokens=76)] * count


MIXES: dict[str, Mix] = {"packed": packed, "short": short, "constant": constant}


def windows(work: Sequence[Work]) -> list[Window]:
    """Noise of the right durations: the engine computes the same for it as for speech."""
    noise = np.random.default_rng(1).standard_normal(round(LONGEST_S * SAMPLE_RATE_HZ)).astype(np.float32) * 0.05
    request = DecodeRequest(language="en")
    return [
        Window(id=next(IDS), samples=noise[: round(one.duration_s * SAMPLE_RATE_HZ)], request=request) for one in work
    ]


def padded(part: Sequence[Window]) -> np.ndarray:
    """float32 [windows, 480000]: what the peers are given, silence behind the audio."""
    found = np.zeros((len(part), round(LONGEST_S * SAMPLE_RATE_HZ)), np.float32)
    for row, window in zip(found, part, strict=True):
        row[: len(window.samples)] = window.samples
    return found


class WrongLengthError(Exception):
    """A system writes more or less than the others: it cannot be compared with them."""


def check(length: int, expected: int) -> None:
    """Raises WrongLengthError."""
    if length != expected:
        raise WrongLengthError(f"a text has {length} tokens instead of {expected}: this compares nothing")


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent are not above."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]
