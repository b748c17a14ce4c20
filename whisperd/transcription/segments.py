"""From a hypothesis in its window to figures, segments and words. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from whisperd.engine.base import Hypothesis, TokenTime
from whisperd.speech import timestamps
from whisperd.speech.fallback import Attempt, compression_ratio
from whisperd.speech.timestamps import Piece, TimestampRule
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.transcript import Segment, TokenScore, Word
from whisperd.speech.units import SAMPLE_RATE_HZ, Span

PROBABILITY_MIN = 1e-10  # where a probability was rounded to nothing, its logarithm is still a number
UNREAD_SPEECH_S = 1.0  # speech behind the last timestamp that makes the rest of a window worth a window of its own
MIN_PROGRESS_S = 1.0  # a continuation must move on by this much, or the model is stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBuilder:
    """Reads hypotheses with the vocabulary of their model; ``words`` and ``scores`` say what segments have beside
    their text.
    """

    vocabulary: Vocabulary
    words: bool = False
    scores: bool = False

    def pieces(self, hypothesis: Hypothesis, window_s: float) -> tuple[Piece, ...]:
        """The hypothesis cut at its timestamps; ``window_s`` is the length of the window's audio."""
        return timestamps.pieces(hypothesis.tokens, self._rule, window_s)

    def figures(self, hypothesis: Hypothesis, window_s: float) -> Attempt:
        """What the safeguards judge a hypothesis by."""
        parts = [part.tokens for part in self.pieces(hypothesis, window_s)]
        ratios = map(compression_ratio, map(self.vocabulary.decode, [hypothesis.tokens, *parts]))
        return Attempt(
            avg_logprob=hypothesis.avg_logprob,
            compression_ratio=max(ratios),
            no_speech_prob=hypothesis.no_speech_prob,
            temperature=hypothesis.temperature,
            past_audio_s=timestamps.past_audio_s(hypothesis.tokens, self._rule, window_s),
            looped=hypothesis.looped,
        )

    def segments(
        self, found: Sequence[Piece], attempt: Attempt, hypothesis: Hypothesis, *, start_s: float, language: str
    ) -> Iterator[Segment]:
        """A segment for each piece that has text.

        ``attempt`` are the figures of ``hypothesis``, and ``start_s`` is where its window begins in the audio.
        """
        spoken = iter(hypothesis.alignment or ())
        for piece in found:
            n_text_tokens = sum(token < self.vocabulary.eot for token in piece.tokens)
            times = [time for _, time in zip(range(n_text_tokens), spoken, strict=False)]
            segment = self._segment(piece, attempt, start_s, times)
            if segment.text.strip():
                yield self._with_words(segment, times, start_s, language) if self.words else segment

    @property
    def _rule(self) -> TimestampRule:
        return TimestampRule(begin=self.vocabulary.timestamp_begin)

    def _segment(self, piece: Piece, attempt: Attempt, start_s: float, times: Sequence[TokenTime]) -> Segment:
        return Segment(
            start_s=round(start_s + piece.start_s, 3),
            end_s=round(start_s + piece.end_s, 3),
            text=self.vocabulary.decode(piece.tokens),
            tokens=piece.tokens,
            temperature=attempt.temperature,
            avg_logprob=attempt.avg_logprob,
            compression_ratio=attempt.compression_ratio,
            no_speech_prob=attempt.no_speech_prob,
            scores=tuple(map(self._score, times)) if self.scores else None,
        )

    def _score(self, time: TokenTime) -> TokenScore:
        logprob = math.log(max(time.probability, PROBABILITY_MIN))
        return TokenScore(data=self.vocabulary.token_bytes(time.token), logprob=logprob)

    def _with_words(self, segment: Segment, times: Sequence[TokenTime], start_s: float, language: str) -> Segment:
        words: list[Word] = []
        position = 0
        for text, tokens in self.vocabulary.split_words([time.token for time in times], language):
            own = times[position : position + len(tokens)]
            position += len(tokens)
            probability = sum(time.probability for time in own) / len(own)
            words.append(Word(text=text, start_s=own[0].start_s, end_s=own[-1].end_s, probability=probability))
        bounded = timestamps.bound_durations(timestamps.merge_punctuation(words))
        return replace(segment, words=timestamps.shifted(bounded, start_s, segment.start_s, segment.end_s))


def split(found: tuple[Piece, ...], span: Span, speech: tuple[Span, ...]) -> tuple[tuple[Piece, ...], Span | None]:
    """The pieces to keep of a window, and the rest of ``span`` that is to be decoded again, if any.

    Where the model stopped before the speech did, the piece that it left open belongs to the rest.
    """
    whole = timestamps.finished(found)
    rest = remainder(span, speech, timestamps.covered_s(whole))
    return (found if rest is None else whole), rest


def remainder(span: Span, speech: tuple[Span, ...], covered_s: float) -> Span | None:
    """What is left of ``span`` behind ``covered_s`` when it holds enough speech, else None."""
    start = span.start_samples + round(covered_s * SAMPLE_RATE_HZ)
    unread = sum(max(0, end - max(begin, start)) for begin, end in speech if end > start)
    if covered_s < MIN_PROGRESS_S or unread < UNREAD_SPEECH_S * SAMPLE_RATE_HZ:
        return None
    return Span(start, span.end_samples)
