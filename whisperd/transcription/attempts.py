"""The windows of one request at the engine: each is decoded until a hypothesis of it is accepted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from whisperd.engine.base import DecodeRequest, Hypothesis, Outcome, WindowFailure
from whisperd.errors import EngineError, Error
from whisperd.speech import fallback
from whisperd.speech.fallback import Attempt, Options
from whisperd.speech.tokenizer import PROMPT_TOKENS_MAX, Vocabulary
from whisperd.speech.transcript import Segment, WindowStatistics
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples, Span
from whisperd.transcription.batcher import Ticket
from whisperd.transcription.model import LoadedModel
from whisperd.transcription.segments import SegmentBuilder, split

HOTWORD_TOKENS_MAX = PROMPT_TOKENS_MAX // 2


@dataclass(slots=True, kw_only=True)
class Slice:
    """Audio of a window, or the rest of one, that is being decoded, and its attempts so far.

    ``index`` counts the windows of the request. ``speech`` lies in ``span``; ``samples``: float32 [span length].
    ``audio`` is the id of its first attempt at the batcher. ``is_prompted``: it is decoded with hotwords and prompt.
    """

    index: int
    span: Span
    speech: tuple[Span, ...]
    samples: Samples
    audio: int | None = None
    is_prompted: bool = True
    attempts: list[tuple[Attempt, Hypothesis]] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """Length of its audio."""
        return len(self.samples) / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Segments of a window; ``complete`` is False while the rest of the window is still decoded."""

    index: int
    segments: tuple[Segment, ...]
    complete: bool


class Attempts:
    """Decodes slices with Whisper's safeguards, each on its own.

    ``language`` is None until the first window with speech has settled it.

    Args:
        model: the vocabulary and the meter.
        options: how to decode.
        ticket: the request's place at the batcher.
    """

    def __init__(self, model: LoadedModel, options: Options, ticket: Ticket) -> None:
        self._ticket = ticket
        self._meter = model.batcher.meter
        self._options = options
        self._builder = SegmentBuilder(
            vocabulary=model.vocabulary, words=options.word_timestamps, scores=options.token_scores
        )
        self._prompt = prompt_tokens(model.vocabulary, options)
        self._running: dict[int, Slice] = {}
        self._count: Counter[str] = Counter()
        self.language = options.language if model.vocabulary.multilingual else "en"
        self.language_probability = 1.0

    @property
    def n_running(self) -> int:
        """Slices at the batcher."""
        return len(self._running)

    @property
    def statistics(self) -> WindowStatistics:
        """Counts of the windows so far."""
        return WindowStatistics(**self._count)

    def submit(self, piece: Slice) -> None:
        """Queues the next attempt of a slice at the batcher."""
        request = DecodeRequest(
            task=self._options.task if self._builder.vocabulary.multilingual else "transcribe",
            language=self.language,
            languages=self._options.languages,
            prompt_tokens=self._prompt if piece.is_prompted else (),
            temperature=self._options.temperatures[len(piece.attempts)],
            beam_size=self._options.beam_size,
            best_of=self._options.best_of,
            word_timestamps=self._options.word_timestamps or self._options.token_scores,
            compression_ratio_threshold=self._options.compression_ratio_threshold,
        )
        window_id = self._ticket.submit(piece.samples, request, again=piece.audio)
        piece.audio = window_id if piece.audio is None else piece.audio
        self._running[window_id] = piece

    def judge(self, outcome: Outcome) -> Accepted | None:
        """The segments of a hypothesis that passes the safeguards or is the best of all attempts.

        None where the slice is decoded again. Raises EngineError when the window failed.
        """
        piece = self._running.pop(outcome.window_id)
        if isinstance(outcome, WindowFailure):
            raise _as_error(outcome.error)
        attempt = self._builder.figures(outcome, piece.duration_s)
        self._count.update(decoded=1, halved=outcome.halvings)
        if self._prompt and piece.is_prompted and self._is_echo(attempt, outcome):
            piece.is_prompted = False
            self._repeat(piece, "echo")
            return None
        piece.attempts.append((attempt, outcome))
        reason = fallback.failure(attempt, self._options)
        if reason and fallback.next_temperature(len(piece.attempts), self._options) is not None:
            self._repeat(piece, reason)
            return None
        chosen = fallback.best([figures for figures, _ in piece.attempts], self._options) if reason else -1
        return self._accept(piece, *piece.attempts[chosen])

    def _repeat(self, piece: Slice, reason: fallback.Reason) -> None:
        self._count.update(retried=1)
        self._meter.count_fallback(reason)
        self.submit(piece)

    def _is_echo(self, attempt: Attempt, hypothesis: Hypothesis) -> bool:
        if fallback.is_silence(attempt, self._options):
            return False
        return fallback.is_echo(self._builder.vocabulary.decode(hypothesis.tokens), self._options)

    def _accept(self, piece: Slice, attempt: Attempt, hypothesis: Hypothesis) -> Accepted:
        if fallback.is_silence(attempt, self._options):
            self._count.update(dropped=1)
            return Accepted(index=piece.index, segments=(), complete=True)
        self._settle_language(hypothesis)
        found = self._builder.pieces(hypothesis, piece.duration_s)
        kept, rest = split(found, piece.span, piece.speech)
        start_s = piece.span.start_samples / SAMPLE_RATE_HZ
        made = self._builder.segments(kept, attempt, hypothesis, start_s=start_s, language=self.language or "en")
        accepted = Accepted(index=piece.index, segments=tuple(made), complete=rest is None)
        if rest is not None:
            self._continue(piece, rest)
        return accepted

    def _settle_language(self, hypothesis: Hypothesis) -> None:
        if self.language is None:
            self.language = hypothesis.language
            self.language_probability = hypothesis.language_probability

    def _continue(self, piece: Slice, rest: Span) -> None:
        """Decodes the rest of a window as a window of its own, as Whisper's seek does."""
        self._count.update(continued=1)
        samples = piece.samples[rest.start_samples - piece.span.start_samples :]
        self.submit(
            Slice(index=piece.index, span=rest, speech=piece.speech, samples=samples, is_prompted=piece.is_prompted)
        )


def prompt_tokens(vocabulary: Vocabulary, options: Options) -> tuple[int, ...]:
    """The prompt of every window: hotwords, in at most half of the room, then the end of the text."""
    hotwords = vocabulary.encode(" " + ", ".join(options.hotwords))[:HOTWORD_TOKENS_MAX] if options.hotwords else ()
    prompt = vocabulary.encode(" " + options.prompt.strip()) if options.prompt else ()
    return (*hotwords, *prompt[-(PROMPT_TOKENS_MAX - len(hotwords)) :])


def _as_error(error: Exception) -> Error:
    return error if isinstance(error, Error) else EngineError(f"inference failed: {error}")
