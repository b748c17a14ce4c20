"""The contract of an engine, the same for the CPU and the GPU: windows go in, hypotheses come out.

An engine owns weights, tokenizer ids and device memory, and knows nothing of requests or files. One thread drives it:
``admit`` up to ``free_slots`` windows, call ``step``, repeat.

Fairness between requests is decided outside, in ``transcription.scheduler``. Inside, an engine orders the windows that
it has admitted by ``Window.lane``: interactive ones first, and bulk windows after a bounded number of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from whisperd.speech.transcript import Task
from whisperd.speech.vad import SpeechNetwork

STEP_S = 0.05  # one ``step`` lasts about this long at most: new windows are admitted between two steps
Lane = Literal["interactive", "bulk"]  # a window of a short request, or of a long one

MAX_NEW_TOKENS = 224  # half of the decoder's 448 positions, as in openai-whisper's sample_len


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """Options for decoding one window; windows with equal requests may share a batch.

    ``language`` None makes a multilingual model detect it, among ``languages`` if any are given. ``prompt_tokens`` are
    previous-text tokens without ``<|startofprev|>``. ``temperature`` 0 is greedy (or ``beam_size`` beams), above 0
    samples ``best_of`` times. The engine may stop a text that repeats itself and compresses better than
    ``compression_ratio_threshold``; None: never.
    """

    task: Task = "transcribe"
    language: str | None = None
    languages: tuple[str, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    beam_size: int = 1
    best_of: int = 5
    word_timestamps: bool = False
    compression_ratio_threshold: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """One piece of audio to decode.

    ``samples``: float32 [n], mono 16 kHz, 0 < n <= WINDOW_SAMPLES; the engine pads with silence to 30 s. ``lane``: the
    engine decodes interactive windows first. ``audio``: windows with an equal number have the same samples, for
    example those that are decoded again, so that the engine may reuse their encoder states; None: decoded once.
    """

    id: int
    samples: NDArray[np.float32]
    request: DecodeRequest
    lane: Lane = "interactive"
    audio: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTime:
    """The time of one text token, in seconds from the start of the window, and its probability."""

    token: int
    start_s: float
    end_s: float
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """The text of one window.

    ``tokens``: sampled ids with timestamp tokens, without the prefix and the end token. ``avg_logprob``: sum of the
    tokens' natural log probabilities over ``len(tokens) + 1``, as in openai-whisper. ``alignment``: one entry per
    text token (id below the end token), in order, if word times were requested. ``halvings``: how often its batch was
    halved for lack of memory. ``looped``: the engine stopped it while it repeated itself.
    """

    window_id: int
    language: str
    language_probability: float
    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float
    temperature: float
    alignment: tuple[TokenTime, ...] | None = None
    halvings: int = 0
    looped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFailure:
    """A window that could not be decoded, with the reason; the engine continues."""

    window_id: int
    error: Exception


Outcome = Hypothesis | WindowFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Constant facts about a loaded model, for status, logs and responses.

    Of its ``slots``, ``spare_slots`` are reserved for interactive windows: an engine that has some decodes these first.
    """

    engine: str
    device: str
    compute_type: str
    multilingual: bool
    languages: tuple[str, ...]
    slots: int
    spare_slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """The state of an engine, which changes while it serves.

    ``pid`` is the process of an engine that runs in its own, ``restarts`` the number of engines that replaced a failed
    one. ``fallback`` is the reason why this engine serves instead of one on a GPU, ``outage`` the reason why no engine
    serves now; both are empty otherwise.
    """

    pid: int | None = None
    restarts: int = 0
    fallback: str = ""
    outage: str = ""


class Engine(Protocol):
    """The seam between whisperd and whatever runs the model. Not thread-safe, except ``info`` and ``health``."""

    @property
    def info(self) -> EngineInfo:
        """Constant facts about the loaded model."""
        ...

    @property
    def health(self) -> EngineHealth:
        """Its state now."""
        ...

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        ...

    def admit(self, windows: Sequence[Window]) -> None:
        """Takes at most ``free_slots`` windows; ids must be unique among those inside."""
        ...

    def step(self) -> Sequence[Outcome]:
        """Works or waits at most about ``STEP_S``; returns the finished windows."""
        ...

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Drops these windows as soon as the engine can; ``step`` may still return them."""
        ...

    def close(self) -> None:
        """Frees memory and threads; the engine is not used again."""
        ...


@runtime_checkable
class Wakeable(Protocol):
    """An engine that may need a ``step`` while no window is inside."""

    def on_wake(self, wake: Callable[[], None]) -> None:
        """Sets the callback for that moment; it is called from any thread and must return at once."""
        ...


@runtime_checkable
class HasDetector(Protocol):
    """An engine that may bring a voice detector, where its device is faster than the CPU."""

    @property
    def detector(self) -> SpeechNetwork | None:
        """The detector on its device, used from any thread beside ``step``; None: the CPU's is as good."""
        ...
