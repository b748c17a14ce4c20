"""What an engine is: windows go in, hypotheses come out. The same contract for the CPU and the GPU.

An engine owns weights, tokenizer ids and device memory. It knows nothing of requests, files or fairness. One thread
drives it: ``admit`` up to ``free_slots`` windows, call ``step``, repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from whisperd.speech.transcript import Task
from whisperd.speech.vad import SpeechNetwork

STEP_S = 0.05  # new windows wait no longer than this to be looked at
Lane = Literal["interactive", "bulk"]  # whose window it is: that of a short request, or of a long one

MAX_NEW_TOKENS = 224  # half of the decoder's 448 positions, as in openai-whisper's sample_len


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """How one window is to be decoded; windows with equal requests may share a batch.

    ``language`` None asks a multilingual model to detect it, among ``languages`` when there are any. ``prompt_tokens``
    are previous-text tokens without ``<|startofprev|>``. ``temperature`` 0 is greedy (or ``beam_size`` beams), above 0
    samples ``best_of`` times. A text that repeats itself and compresses better than ``compression_ratio_threshold`` may
    be broken off; None: never.
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

    ``samples``: float32 [n], mono 16 kHz, 0 < n <= WINDOW_SAMPLES; the engine pads with silence to 30 s. An engine
    whose batches run to their end decodes interactive windows first and apart. ``audio``: windows of one engine with an
    equal number have the same samples, as those that are decoded again; what the engine still knows of them it need not
    compute anew. None: it will not come again.
    """

    id: int
    samples: NDArray[np.float32]
    request: DecodeRequest
    lane: Lane = "interactive"
    audio: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTime:
    """When one text token is spoken: seconds from the start of the window, and its probability."""

    token: int
    start_s: float
    end_s: float
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """What the model read in one window.

    ``tokens``: sampled ids with timestamp tokens, without the prefix and the end token. ``avg_logprob``: sum of the
    tokens' natural log probabilities over ``len(tokens) + 1``, as in openai-whisper. ``alignment``: one entry per
    text token (id below the end token), in order, when word times were asked for. ``halvings``: how often its batch
    was halved because the memory was not enough. ``looped``: it was broken off while it repeated itself.
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
    """A window that could not be decoded, with the reason; the engine itself goes on."""

    window_id: int
    error: Exception


Outcome = Hypothesis | WindowFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts for status, logs and responses.

    Of its ``slots``, ``spare_slots`` are for interactive windows alone: an engine that has some lets these go first.
    ``pid`` is that of an engine in a process of its own, ``restarts`` how often an engine took the
    place of one that had died. ``fallback`` says why this engine serves instead of one on a GPU, and ``outage`` why
    nothing serves at the moment; both are empty when all is well.
    """

    engine: str
    device: str
    compute_type: str
    multilingual: bool
    languages: tuple[str, ...]
    slots: int
    spare_slots: int = 0
    pid: int | None = None
    restarts: int = 0
    fallback: str = ""
    outage: str = ""


class Engine(Protocol):
    """The seam between whisperd and whatever runs the model. Not thread-safe, except ``info``."""

    @property
    def info(self) -> EngineInfo:
        """Constant facts about the loaded model."""
        ...

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        ...

    def admit(self, windows: Sequence[Window]) -> None:
        """Takes at most ``free_slots`` windows; ids must be unique among those inside."""
        ...

    def step(self) -> Sequence[Outcome]:
        """Works or waits for a moment, at most about ``STEP_S``; returns what is finished, if anything."""
        ...

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Forgets these windows as soon as the engine can; they may still come out of ``step``."""
        ...

    def close(self) -> None:
        """Frees memory and threads; the engine is not used again."""
        ...


@runtime_checkable
class Restless(Protocol):
    """An engine in which something may happen while no window is inside, and which wants a ``step`` then."""

    def on_news(self, nudge: Callable[[], None]) -> None:
        """``nudge`` is called from any thread, and must return at once."""
        ...


@runtime_checkable
class Hearing(Protocol):
    """An engine that may also find speech, where its device does it faster than the CPU."""

    @property
    def detector(self) -> SpeechNetwork | None:
        """The one on its device, used from any thread beside ``step``; None: it has no better one than the CPU's."""
        ...
