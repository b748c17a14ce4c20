"""Decodes a batch of windows with CTranslate2: language, text, scores and token times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.base import DecodeRequest, Hypothesis, TokenTime, Window
from whisperd.engine.cpu.encoder import WindowEncoder
from whisperd.engine.cpu.unpadded import ShortWindows, frames_of, is_doubtful, may_be_short
from whisperd.errors import EngineError, OutOfMemory
from whisperd.speech.features import CHUNK_FRAMES, HOP_SAMPLES
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import ENCODER_STATES_PER_S, MEDIAN_FILTER_WIDTH, TIMESTAMP_STEP_S, Floats

if TYPE_CHECKING:
    import ctranslate2

DECODER_POSITIONS = 448  # CTranslate2 stops a text at half of it, as openai-whisper does
EXHAUSTED = ("out of memory", "bad_alloc", "bad alloc", "alloc_failed", "allocation failed", "cannot allocate memory")


class BatchDecoder:
    """Decodes windows that may share a batch; used by several workers at the same time."""

    def __init__(
        self,
        model: ctranslate2.models.Whisper,
        vocabulary: Vocabulary,
        encoder: WindowEncoder,
        *,
        short_windows: ShortWindows = "never",
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._short_windows = short_windows
        self._language_of = {f"<|{code}|>": code for code in vocabulary.languages}

    def encode(self, window: Window) -> Floats:
        """float32 [1, up to 1500, d_model]; raises OutOfMemory or EngineError."""
        try:
            return self._encoder.short(window) if self._is_short(window) else self._encoder.whole(window)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise translated(error) from error

    def __call__(self, batch: Sequence[Window], encoded: dict[int, Floats]) -> list[Hypothesis]:
        """Takes the states of the batch out of ``encoded`` (by window id); raises OutOfMemory or EngineError."""
        try:
            return self._retried_if_doubtful(batch, self._decoded(batch, self._taken(batch, encoded)))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise translated(error) from error

    def _taken(self, batch: Sequence[Window], encoded: dict[int, Floats]) -> Floats:
        """The batch's states; the rows they are copied from are freed before decoding."""
        found = (encoded.pop(window.id, None) for window in batch)
        pairs = zip(batch, found, strict=True)
        return self._encoder.together([self.encode(window) if row is None else row for window, row in pairs])

    def _is_short(self, window: Window) -> bool:
        """True if the padding is left out; a window that is decoded again is decoded whole."""
        whole = self._short_windows == "never" or frames_of(window) == CHUNK_FRAMES
        if whole or window.request.temperature > 0.0:
            return False
        multilingual = self._vocabulary.multilingual
        language = window.request.language if multilingual else "en"
        return may_be_short(self._short_windows, language, self._encoder.width, multilingual=multilingual)

    def _retried_if_doubtful(self, batch: Sequence[Window], found: list[Hypothesis]) -> list[Hypothesis]:
        """Decodes windows again with their padding when their text looks like a loop or a guess."""
        doubtful = [
            (place, window)
            for place, (window, hypothesis) in enumerate(zip(batch, found, strict=True))
            if self._is_short(window) and self._is_doubtful(hypothesis, window)
        ]
        if doubtful:
            windows = [window for _, window in doubtful]
            whole = self._encoder.together([self._encoder.whole(window) for window in windows])
            again = self._decoded(windows, whole)
            for (place, _), hypothesis in zip(doubtful, again, strict=True):
                found[place] = hypothesis
        return found

    def _is_doubtful(self, hypothesis: Hypothesis, window: Window) -> bool:
        begin = self._vocabulary.timestamp_begin
        text = self._vocabulary.decode([token for token in hypothesis.tokens if token < self._vocabulary.eot])
        end_s = max((token - begin for token in hypothesis.tokens if token >= begin), default=0) * TIMESTAMP_STEP_S
        return is_doubtful(text, hypothesis.avg_logprob, end_s, window)

    def _decoded(self, batch: Sequence[Window], states: Floats) -> list[Hypothesis]:
        import ctranslate2

        encoded = ctranslate2.StorageView.from_array(states)
        languages = self._languages(batch, encoded)
        prompts = [
            self._vocabulary.prefix(window.request.task, language, window.request.prompt_tokens)
            for window, (language, _) in zip(batch, languages, strict=True)
        ]
        results = self._model.generate(encoded, prompts, **_sampling(batch[0].request))
        found = [
            _hypothesis(window, language, result)
            for window, language, result in zip(batch, languages, results, strict=True)
        ]
        return self._with_alignments(batch, found, encoded)

    def _languages(self, batch: Sequence[Window], encoded: ctranslate2.StorageView) -> list[tuple[str, float]]:
        """The language of each window and its probability: requested (1.0) or detected."""
        asked = [window.request.language for window in batch]
        if not self._vocabulary.multilingual:
            return [("en", 1.0) for _ in asked]
        if None not in asked:
            return [(language, 1.0) for language in asked if language is not None]
        detected = self._model.detect_language(encoded)
        return [
            (window.request.language, 1.0)
            if window.request.language is not None
            else self._most_probable(ranking, window.request.languages)
            for window, ranking in zip(batch, detected, strict=True)
        ]

    def _most_probable(self, ranking: Sequence[tuple[str, float]], among: Sequence[str]) -> tuple[str, float]:
        known = ((self._language_of.get(token), probability) for token, probability in ranking)
        return next(
            ((code, probability) for code, probability in known if code is not None and (not among or code in among)),
            ("en", 0.0),
        )

    def _with_alignments(
        self, batch: Sequence[Window], found: list[Hypothesis], encoded: ctranslate2.StorageView
    ) -> list[Hypothesis]:
        if not any(window.request.word_timestamps for window in batch):
            return found
        return [
            self._aligned(window, hypothesis, row) if window.request.word_timestamps else hypothesis
            for window, hypothesis, row in zip(batch, found, _rows(encoded), strict=True)
        ]

    def _aligned(self, window: Window, hypothesis: Hypothesis, row: NDArray[np.float32]) -> Hypothesis:
        """Adds token times; ``row``: float32 [1, 1500, d_model], the encoded window."""
        import ctranslate2

        tokens = [token for token in hypothesis.tokens if token < self._vocabulary.eot]
        if not tokens:
            return replace(hypothesis, alignment=())
        (result,) = self._model.align(
            ctranslate2.StorageView.from_array(row),
            self._vocabulary.start(window.request.task, hypothesis.language),
            [tokens],
            -(-len(window.samples) // HOP_SAMPLES),
            median_filter_width=MEDIAN_FILTER_WIDTH,
        )
        return replace(hypothesis, alignment=_token_times(tokens, result))


def _sampling(request: DecodeRequest) -> dict[str, Any]:
    common = {"max_length": DECODER_POSITIONS, "return_scores": True, "return_no_speech_prob": True}
    if request.temperature == 0.0:
        return common | {"beam_size": request.beam_size}
    return common | {
        "beam_size": 1,
        "num_hypotheses": request.best_of,
        "sampling_topk": 0,
        "sampling_temperature": request.temperature,
    }


def _hypothesis(window: Window, language: tuple[str, float], result: Any) -> Hypothesis:
    """CTranslate2's score is a mean over the tokens; openai-whisper divides by one more, for the end token."""
    best = int(np.argmax(result.scores))
    tokens = tuple(result.sequences_ids[best])
    return Hypothesis(
        window_id=window.id,
        language=language[0],
        language_probability=language[1],
        tokens=tokens,
        avg_logprob=float(result.scores[best]) * len(tokens) / (len(tokens) + 1),
        no_speech_prob=float(result.no_speech_prob),
        temperature=window.request.temperature,
    )


def _rows(encoded: ctranslate2.StorageView) -> list[NDArray[np.float32]]:
    states = np.asarray(encoded)
    return [np.ascontiguousarray(states[index : index + 1]) for index in range(len(states))]


def _token_times(tokens: Sequence[int], result: Any) -> tuple[TokenTime, ...]:
    """A token starts where the path of the alignment first reaches it, and ends where the next one starts."""
    text_at, state_at = np.array(result.alignments).T
    starts = state_at[np.diff(text_at, prepend=-1).astype(bool)] / ENCODER_STATES_PER_S
    ends = [*starts[1:], state_at[-1] / ENCODER_STATES_PER_S]
    return tuple(
        TokenTime(token=token, start_s=float(start_s), end_s=float(end_s), probability=float(probability))
        for token, start_s, end_s, probability in zip(tokens, starts, ends, result.text_token_probs, strict=False)
    )


def translated(error: Exception) -> EngineError:
    """What CTranslate2 or OpenVINO raised as OutOfMemory or EngineError."""
    message = f"CTranslate2 failed: {error or type(error).__name__}"
    return OutOfMemory(message) if is_exhaustion(error) else EngineError(message)


def is_exhaustion(error: Exception) -> bool:
    """True for std::bad_alloc, which arrives as MemoryError, and for the messages of a device's library."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in EXHAUSTED)
