"""One request end to end: audio -> speech -> windows -> hypotheses -> transcript.

Audio is decoded, cut and queued as a stream: a bounded number of windows is in memory at any time, however long the
file is. Windows finish in any order, and their segments are passed on in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from whisperd.errors import Cancelled, RequestError
from whisperd.speech.audio import AudioRequest, Decoder, InProcessDecoder, Recording
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions
from whisperd.speech.transcript import Segment, Transcript
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples
from whisperd.transcription.attempts import Accepted, Attempts, Slice
from whisperd.transcription.model import LoadedModel
from whisperd.transcription.windows import SampleBuffer, cuts

BATCHES_AHEAD = 2  # windows of one request in memory, in multiples of the engine's slots: one runs, one waits
INTERACTIVE_S = 60.0  # longer audio is bulk: no user waits for it as for an answer
INTERACTIVE_WINDOWS = 2  # audio whose length is not known becomes bulk behind so many windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Callbacks of a request, called from its thread; all times in seconds of audio.

    ``on_length`` comes first, where the header says how long the audio is; an error that it raises ends the request.
    ``on_progress`` gets the seconds that are done, and the length where it is known.
    """

    on_length: Callable[[float], None] = lambda _: None
    on_segment: Callable[[Segment], None] = lambda _: None
    on_progress: Callable[[float, float | None], None] = lambda _done, _total: None


class Transcription:
    """One request. ``run`` is called once and blocks; ``cancel`` may be called from any thread.

    Args:
        model: decodes it.
        options: how to decode; a ``language`` of None is detected on the first window that holds speech.
        cutting: how to cut the audio.
        listener: gets segments in order, and progress.
        max_audio_s: longer audio is refused.
        bulk: whether it yields to other requests; None decides by its length.
        track: number of an audio track, from 0, or its language; None is the default one of the file.
        decoder: opens the audio; None decodes in this process, which is for files that are trusted.
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
        track: int | str | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        options, self._warnings = usable(model, options)
        self._model = model
        self._task = options.task
        self._cutting = cutting
        self._listener = listener or Listener()
        self._max_audio_s = max_audio_s
        self._bulk = bulk
        self._track = track
        self._decoder = decoder or InProcessDecoder()
        self._cancelled = threading.Event()
        self._ticket = model.batcher.ticket()
        self._attempts = Attempts(model, options, self._ticket)

    def cancel(self) -> None:
        """Makes ``run`` raise Cancelled as soon as it can; its windows leave the engine now."""
        self._cancelled.set()
        self._ticket.close()
        self._ticket.poke()

    def run(self, file: BinaryIO, *, name: str | None = None) -> Transcript:
        """Transcribes ``file`` (any container). Raises AudioError, EngineError, Cancelled."""
        request = AudioRequest(name=name, max_s=self._max_audio_s, track=self._track)
        with closing(self._ticket), self._decoder.open(file, request) as recording:
            return self._transcribe(recording)

    def _transcribe(self, recording: Recording) -> Transcript:
        total_s = recording.length_s
        if total_s is not None:
            self._listener.on_length(total_s)
        buffer, order = SampleBuffer(), _InOrder(self._listener, total_s)
        blocks = self._blocks(recording)
        for index, cut in enumerate(cuts(blocks, buffer, self._model.detector, self._cutting)):
            self._ticket.bulk = self._is_bulk(index, total_s)
            order.expect(index, cut.span.end_samples / SAMPLE_RATE_HZ)
            samples = buffer.copy(cut.span)
            self._attempts.submit(Slice(index=index, span=cut.span, speech=cut.speech, samples=samples))
            while self._attempts.n_running and not self._may_read_on():
                self._collect(order)
        while self._attempts.n_running:
            self._collect(order)
        return self._transcript(order.segments, buffer.end_samples, recording.warnings)

    def _blocks(self, recording: Recording) -> Iterator[Samples]:
        for block in recording.blocks():
            self._check_cancelled()
            yield block

    def _is_bulk(self, index: int, total_s: float | None) -> bool:
        if self._bulk is not None:
            return self._bulk
        return index >= INTERACTIVE_WINDOWS if total_s is None else total_s > INTERACTIVE_S

    def _may_read_on(self) -> bool:
        info = self._model.batcher.info
        limit = BATCHES_AHEAD * (info.slots - info.spare_slots)
        return self._attempts.language is not None and self._attempts.n_running < limit

    def _collect(self, order: _InOrder) -> None:
        """Waits for the next window that is finished."""
        outcome = self._ticket.collect()
        self._check_cancelled()
        accepted = None if outcome is None else self._attempts.judge(outcome)
        if accepted is not None:
            order.add(accepted)

    def _transcript(self, segments: Sequence[Segment], total_samples: int, warnings: tuple[str, ...]) -> Transcript:
        return Transcript(
            task=self._task,
            language=self._attempts.language or "",
            language_probability=self._attempts.language_probability if self._attempts.language else 0.0,
            duration_s=total_samples / SAMPLE_RATE_HZ,
            segments=tuple(segments),
            windows=self._attempts.statistics,
            warnings=(*self._warnings, *warnings),
        )

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the request was cancelled")


@dataclass(slots=True, kw_only=True)
class _Window:
    end_s: float
    segments: list[Segment] = field(default_factory=list)
    complete: bool = False


class _InOrder:
    """Passes the segments of complete windows to the listener, in the order of the audio."""

    def __init__(self, listener: Listener, total_s: float | None) -> None:
        self.segments: list[Segment] = []
        self._listener = listener
        self._total_s = total_s
        self._windows: dict[int, _Window] = {}
        self._next = 0

    def expect(self, index: int, end_s: float) -> None:
        """Registers a window, which ends at ``end_s`` of the audio."""
        self._windows[index] = _Window(end_s=end_s)

    def add(self, accepted: Accepted) -> None:
        """Adds segments of a window, and passes on what is complete by then."""
        window = self._windows[accepted.index]
        window.segments.extend(accepted.segments)
        window.complete = accepted.complete
        while self._next in self._windows and self._windows[self._next].complete:
            self._emit(self._windows.pop(self._next))
            self._next += 1

    def _emit(self, window: _Window) -> None:
        segments = sorted(window.segments, key=lambda segment: segment.start_s)
        self.segments.extend(segments)
        for segment in segments:
            self._listener.on_segment(segment)
        self._listener.on_progress(window.end_s, self._total_s)


def usable(model: LoadedModel, options: Options) -> tuple[Options, tuple[str, ...]]:
    """Leaves out hints at languages that the model lacks; returns the options and a warning for each hint.

    Raises RequestError when the model lacks the language, or every language of the hints.
    """
    _check_language(model, options.language, "language")
    known = tuple(language for language in options.languages if language in model.vocabulary.languages)
    lacking = [language for language in options.languages if language not in known]
    if lacking and not known:
        _check_language(model, lacking[0], "languages")
    warnings = tuple(f"model {model.name!r} does not know the language {one!r}; the hint is ignored" for one in lacking)
    if len(known) == 1 and options.language is None:
        return replace(options, language=known[0], languages=()), warnings
    return replace(options, languages=known), warnings


def _check_language(model: LoadedModel, language: str | None, param: str) -> None:
    languages = model.vocabulary.languages
    if language is not None and language not in languages:
        known = "English only" if not model.vocabulary.multilingual else f"{len(languages)} languages"
        raise RequestError(
            f"model {model.name!r} does not speak {language!r} (it knows {known}); "
            "choose another language or a multilingual model",
            param=param,
        )
