"""What a transcription is: words, segments, transcripts. Times in seconds from the start of the audio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["transcribe", "translate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One word with its punctuation; ``text`` keeps the leading space."""

    text: str
    start_s: float
    end_s: float
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """One text token: its own bytes, which may be a part of a character, and its natural log probability."""

    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One phrase as the model cut it, with the figures that Whisper's safeguards looked at.

    ``tokens`` are the sampled ids including timestamps; ``text`` keeps the leading space. ``words`` and ``scores`` are
    there when they were asked for.
    """

    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None
    scores: tuple[TokenScore, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStatistics:
    """How the windows of one request fared; counts. ``halved``: how often memory was short and a batch was halved."""

    decoded: int = 0
    retried: int = 0
    dropped: int = 0
    continued: int = 0
    halved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The outcome of one request. ``language`` is a code such as ``"en"``; it is empty, with a probability of 0,
    where it was to be detected and nobody speaks.

    ``warnings``: sentences on what the caller should know, such as audio that is missing or a field that was ignored.
    """

    task: Task
    language: str
    language_probability: float
    duration_s: float
    segments: tuple[Segment, ...]
    windows: WindowStatistics = WindowStatistics()
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All segments as one line."""
        return "".join(segment.text for segment in self.segments).strip()
