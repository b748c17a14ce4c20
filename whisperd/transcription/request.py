"""One request end to end: audio -> speech -> windows -> hypotheses -> transcript.

Audio is decoded, cut and queued as a stream: a bounded number of windows is in memory at any time, however long the
file is. Results come back in any order and are told in order.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np

from whisperd.engine.base import DecodeRequest, Hypothesis, TokenTime, WindowFailure
from whisperd.errors import Cancelled, EngineError, Error, RequestError
from whisperd.speech import audio, timestamps
from whisperd.speech import fallback as decoding
from whisperd.speech.fallback import Attempt, Options
from whisperd.speech.segmentation import Cut, CutOptions, Cutter
from whisperd.speech.timestamps import Piece, TimestampRule
from whisperd.speech.tokenizer import PROMPT_TOKENS_MAX, Vocabulary
from whisperd.speech.transcript import Segment, TokenScore, Transcript, WindowStatistics, Word
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples, Span
from whisperd.speech.vad import SpeechNetwork, SpeechStream
from whisperd.transcription.batcher import Batcher

HOTWORD_TOKENS_MAX = PROMPT_TOKENS_MAX // 2
PROBABILITY_MIN = 1e-10  # where a probability was rounded to nothing, its logarithm is still a number
BATCHES_AHEAD = 2  # windows of one request in memory, in multiples of the engine's slots: one runs, one waits
UNREAD_SPEECH_S = 1.0  # speech behind the last timestamp that makes the rest of a window worth a window of its own
INTERACTIVE_S = 60.0  # longer audio is bulk: nobody sits and waits for it as for an answer
INTERACTIVE_WINDOWS = 2  # audio whose length is not known becomes bulk behind so many windows
MIN_PROGRESS_S = 1.0  # a continuation must move on by this much, or the model is stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that serves: everything a request needs of it. ``memory_bytes`` is what it is counted as."""

    name: str
    vocabulary: Vocabulary
    batcher: Batcher
    detector: SpeechNetwork
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who wants to know while it runs; called from the request's thread. Progress in seconds of audio.

    ``on_length`` hears first, when the header says how long the audio is; what it raises ends the request.
    """

    on_length: Callable[[float], None] = lambda _: None
    on_segment: Callable[[Segment], None] = lambda _: None
    on_progress: Callable[[float, float | None], None] = lambda _done, _total: None


@dataclass(slots=True, kw_only=True)
class _Slice:
    """A piece of a window's audio that is being decoded, and what came out so far; ``audio``: its first window's id."""

    index: int
    span: Span
    speech: tuple[Span, ...]
    samples: Samples
    audio: int | None = None
    attempts: list[tuple[Attempt, Hypothesis]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Count:
    decoded: int = 0
    retried: int = 0
    dropped: int = 0
    continued: int = 0
    halved: int = 0


class SampleBuffer:
    """The stretch of audio that may still be asked for, float32 16 kHz."""

    def __init__(self) -> None:
        self._blocks: deque[tuple[int, Samples]] = deque()
        self.end_samples = 0

    def append(self, block: Samples) -> None:
        """Adds the next block, float32 [n]."""
        self._blocks.append((self.end_samples, block))
        self.end_samples += len(block)

    def copy(self, span: Span) -> Samples:
        """The samples of ``span``, which must not have been dropped; float32 [span length]."""
        start, end = span
        parts = [
            block[max(0, start - at) : end - at] for at, block in self._blocks if at < end and at + len(block) > start
        ]
        return np.concatenate(parts)

    def drop_before(self, position_samples: int) -> None:
        """Forgets whole blocks that end before this sample."""
        while self._blocks and self._blocks[0][0] + len(self._blocks[0][1]) <= position_samples:
            self._blocks.popleft()


class Transcription:
    """One request; lives and dies with ``run``, which blocks. ``cancel`` may be called from any thread.

    Args:
        model: what decodes it.
        options: how; a ``language`` of None is detected on the first window that holds speech.
        cutting: how the audio is cut.
        listener: told of segments in order, and of progress.
        max_audio_s: longer audio is refused.
        bulk: whether it leaves the way to others; None decides by its length.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: Options,
        cutting: CutOptions,
        *,
        listener: Listener | None = None,
        max_audio_s: float | None = None,
        bulk: bool | None = None,
    ) -> None:
        check(model, options)
        self._model = model
        self._options = options
        self._cutting = cutting
        self._listener = listener or Listener()
        self._max_audio_s = max_audio_s
        self._bulk = bulk
        self._cancelled = threading.Event()
        self._ticket = model.batcher.ticket()
        self._vocabulary = model.vocabulary
        self._rule = TimestampRule(begin=model.vocabulary.timestamp_begin)
        self._prompt = prompt_tokens(model.vocabulary, options)
        self._language = options.language if model.vocabulary.multilingual else "en"
        self._language_probability = 1.0
        self._running: dict[int, _Slice] = {}
        self._pending: dict[int, int] = {}
        self._results: dict[int, list[Segment]] = {}
        self._ends_s: dict[int, float] = {}
        self._told = 0
        self._segments: list[Segment] = []
        self._count = _Count()

    def cancel(self) -> None:
        """Makes ``run`` raise Cancelled as soon as it can; its windows leave the engine now."""
        self._cancelled.set()
        self._ticket.close()
        self._ticket.poke()

    def run(self, file: BinaryIO, *, name: str | None = None) -> Transcript:
        """Transcribes ``file`` (any container). Raises AudioError, EngineError, Cancelled."""
        with closing(self._ticket):
            return self._read(file, name, audio.probe(file))

    def _read(self, file: BinaryIO, name: str | None, total_s: float | None) -> Transcript:
        if total_s is not None:
            self._listener.on_length(total_s)
        buffer = SampleBuffer()
        for index, cut in enumerate(self._cuts(file, name, buffer)):
            self._ticket.bulk = self._is_bulk(index, total_s)
            self._pending[index] = 1
            self._ends_s[index] = cut.span.end_samples / SAMPLE_RATE_HZ
            self._submit(_Slice(index=index, span=cut.span, speech=cut.speech, samples=buffer.copy(cut.span)))
            while self._running and not self._may_read_on():
                self._collect(total_s)
        while self._running:
            self._collect(total_s)
        return self._transcript(buffer.end_samples)

    def _cuts(self, file: BinaryIO, name: str | None, buffer: SampleBuffer) -> Iterator[Cut]:
        stream = SpeechStream(self._model.detector)
        cutter = Cutter(self._cutting)
        for block in audio.blocks(file, name=name, max_s=self._max_audio_s):
            self._check_cancelled()
            buffer.append(block)
            yield from cutter.feed(stream.feed(block))
            buffer.drop_before(cutter.needed_from_samples)
        yield from cutter.feed(stream.finish())
        yield from cutter.finish(buffer.end_samples)

    def _is_bulk(self, index: int, total_s: float | None) -> bool:
        if self._bulk is not None:
            return self._bulk
        return index >= INTERACTIVE_WINDOWS if total_s is None else total_s > INTERACTIVE_S

    def _may_read_on(self) -> bool:
        info = self._model.batcher.info
        limit = BATCHES_AHEAD * (info.slots - info.spare_slots)
        return self._language is not None and len(self._running) < limit

    def _submit(self, piece: _Slice) -> None:
        request = DecodeRequest(
            task=self._options.task if self._vocabulary.multilingual else "transcribe",
            language=self._language,
            languages=self._options.languages,
            prompt_tokens=self._prompt,
            temperature=self._options.temperatures[len(piece.attempts)],
            beam_size=self._options.beam_size,
            best_of=self._options.best_of,
            word_timestamps=self._options.word_timestamps or self._options.token_scores,
            compression_ratio_threshold=self._options.compression_ratio_threshold,
        )
        window_id = self._ticket.submit(piece.samples, request, again=piece.audio)
        piece.audio = window_id if piece.audio is None else piece.audio
        self._running[window_id] = piece

    def _collect(self, total_s: float | None) -> None:
        outcome = self._ticket.collect()
        self._check_cancelled()
        if outcome is None:
            return
        piece = self._running.pop(outcome.window_id)
        if isinstance(outcome, WindowFailure):
            raise _as_error(outcome.error)
        self._judge(piece, outcome)
        self._tell(total_s)

    def _judge(self, piece: _Slice, hypothesis: Hypothesis) -> None:
        attempt = self._figures(piece, hypothesis)
        piece.attempts.append((attempt, hypothesis))
        self._count.decoded += 1
        self._count.halved += hypothesis.halvings
        reason = decoding.failure(attempt, self._options)
        if reason and decoding.next_temperature(len(piece.attempts), self._options) is not None:
            self._count.retried += 1
            self._model.batcher.meter.count_fallback(reason)
            self._submit(piece)
        else:
            chosen = -1 if not reason else decoding.best([figures for figures, _ in piece.attempts], self._options)
            self._accept(piece, *piece.attempts[chosen])

    def _figures(self, piece: _Slice, hypothesis: Hypothesis) -> Attempt:
        window_s = len(piece.samples) / SAMPLE_RATE_HZ
        parts = [part.tokens for part in timestamps.pieces(hypothesis.tokens, self._rule, window_s)]
        ratios = map(decoding.compression_ratio, map(self._vocabulary.decode, [hypothesis.tokens, *parts]))
        return Attempt(
            avg_logprob=hypothesis.avg_logprob,
            compression_ratio=max(ratios),
            no_speech_prob=hypothesis.no_speech_prob,
            temperature=hypothesis.temperature,
            past_audio_s=timestamps.past_audio_s(hypothesis.tokens, self._rule, window_s),
            looped=hypothesis.looped,
        )

    def _accept(self, piece: _Slice, attempt: Attempt, hypothesis: Hypothesis) -> None:
        results = self._results.setdefault(piece.index, [])
        if decoding.is_silence(attempt, self._options):
            self._count.dropped += 1
        else:
            self._settle_language(hypothesis)
            window_s = len(piece.samples) / SAMPLE_RATE_HZ
            found = timestamps.pieces(hypothesis.tokens, self._rule, window_s)
            whole = timestamps.finished(found)
            rest = remainder(piece.span, piece.speech, timestamps.covered_s(whole))
            results.extend(self._make_segments(piece, attempt, hypothesis, whole if rest else found))
            if rest is not None:
                self._continue(piece, rest)
        self._pending[piece.index] -= 1

    def _settle_language(self, hypothesis: Hypothesis) -> None:
        if self._language is None:
            self._language = hypothesis.language
            self._language_probability = hypothesis.language_probability

    def _continue(self, piece: _Slice, rest: Span) -> None:
        """The model stopped before the speech did: the rest becomes a window, as Whisper's own seek does it."""
        self._count.continued += 1
        self._pending[piece.index] += 1
        samples = piece.samples[rest.start_samples - piece.span.start_samples :]
        self._submit(_Slice(index=piece.index, span=rest, speech=piece.speech, samples=samples))

    def _make_segments(
        self, piece: _Slice, attempt: Attempt, hypothesis: Hypothesis, found: tuple[Piece, ...]
    ) -> Iterator[Segment]:
        offset_s = piece.span.start_samples / SAMPLE_RATE_HZ
        spoken = iter(hypothesis.alignment or ())
        for part in found:
            text = self._vocabulary.decode(part.tokens)
            n_text_tokens = sum(token < self._vocabulary.eot for token in part.tokens)
            times = [time for _, time in zip(range(n_text_tokens), spoken, strict=False)]
            segment = Segment(
                start_s=round(offset_s + part.start_s, 3),
                end_s=round(offset_s + part.end_s, 3),
                text=text,
                tokens=part.tokens,
                temperature=attempt.temperature,
                avg_logprob=attempt.avg_logprob,
                compression_ratio=attempt.compression_ratio,
                no_speech_prob=attempt.no_speech_prob,
                scores=self._scores(times) if self._options.token_scores else None,
            )
            if text.strip():
                yield self._with_words(segment, times, offset_s) if self._options.word_timestamps else segment

    def _scores(self, times: list[TokenTime]) -> tuple[TokenScore, ...]:
        return tuple(
            TokenScore(
                data=self._vocabulary.token_bytes(time.token), logprob=math.log(max(time.probability, PROBABILITY_MIN))
            )
            for time in times
        )

    def _with_words(self, segment: Segment, times: list[TokenTime], offset_s: float) -> Segment:
        words: list[Word] = []
        position = 0
        for text, tokens in self._vocabulary.split_words([time.token for time in times], self._language or "en"):
            mine = times[position : position + len(tokens)]
            position += len(tokens)
            probability = sum(time.probability for time in mine) / len(mine)
            words.append(Word(text=text, start_s=mine[0].start_s, end_s=mine[-1].end_s, probability=probability))
        tidy = timestamps.bound_durations(timestamps.merge_punctuation(words))
        placed = timestamps.shifted(tidy, offset_s, segment.start_s, segment.end_s)
        return replace(segment, words=placed)

    def _tell(self, total_s: float | None) -> None:
        while self._pending.get(self._told) == 0:
            segments = sorted(self._results.pop(self._told), key=lambda segment: segment.start_s)
            self._segments.extend(segments)
            for segment in segments:
                self._listener.on_segment(segment)
            self._listener.on_progress(self._ends_s.pop(self._told), total_s)
            del self._pending[self._told]
            self._told += 1

    def _transcript(self, total_samples: int) -> Transcript:
        return Transcript(
            task=self._options.task,
            language=self._language or "en",
            language_probability=self._language_probability,
            duration_s=total_samples / SAMPLE_RATE_HZ,
            segments=tuple(self._segments),
            windows=WindowStatistics(
                decoded=self._count.decoded,
                retried=self._count.retried,
                dropped=self._count.dropped,
                continued=self._count.continued,
                halved=self._count.halved,
            ),
        )

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the request was cancelled")


def check(model: LoadedModel, options: Options) -> None:
    """Raises RequestError when the model cannot do what the options ask."""
    _check_language(model, options.language, "language")
    for language in options.languages:
        _check_language(model, language, "languages")


def _check_language(model: LoadedModel, language: str | None, param: str) -> None:
    languages = model.vocabulary.languages
    if language is not None and language not in languages:
        known = "English only" if not model.vocabulary.multilingual else f"{len(languages)} languages"
        raise RequestError(
            f"model {model.name!r} does not speak {language!r} (it knows {known}); "
            "choose another language or a multilingual model",
            param=param,
        )


def prompt_tokens(vocabulary: Vocabulary, options: Options) -> tuple[int, ...]:
    """What every window sees as said before: hotwords, at most half of the room, then the end of the prompt."""
    hotwords = vocabulary.encode(" " + ", ".join(options.hotwords))[:HOTWORD_TOKENS_MAX] if options.hotwords else ()
    prompt = vocabulary.encode(" " + options.prompt.strip()) if options.prompt else ()
    return (*hotwords, *prompt[-(PROMPT_TOKENS_MAX - len(hotwords)) :])


def remainder(span: Span, speech: tuple[Span, ...], covered_s: float) -> Span | None:
    """What is left of a window behind ``covered_s`` when enough speech was heard there, else None."""
    start = span.start_samples + round(covered_s * SAMPLE_RATE_HZ)
    unread = sum(max(0, end - max(begin, start)) for begin, end in speech if end > start)
    if covered_s < MIN_PROGRESS_S or unread < UNREAD_SPEECH_S * SAMPLE_RATE_HZ:
        return None
    return Span(start, span.end_samples)


def _as_error(error: Exception) -> Error:
    return error if isinstance(error, Error) else EngineError(f"inference failed: {error}")
