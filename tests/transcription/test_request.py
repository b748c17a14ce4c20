"""One request end to end: no speech is lost, no text is invented, safeguards hold in batches."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.fakes import FakeEngine, Script, written
from tests.support.speech import Clip, music, noise, plain, silence, wav
from whisperd.engine.base import DecodeRequest, Hypothesis, Window
from whisperd.errors import AudioError, AudioTooLong, Cancelled, EngineError, RequestError
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions
from whisperd.speech.tokenizer import PROMPT_TOKENS_MAX, Vocabulary
from whisperd.speech.transcript import Transcript
from whisperd.speech.units import SAMPLE_RATE_HZ, Samples
from whisperd.speech.vad import SpeechDetector
from whisperd.transcription.attempts import prompt_tokens
from whisperd.transcription.batcher import Batcher, Ticket
from whisperd.transcription.model import LoadedModel
from whisperd.transcription.request import Listener, Transcription, usable

MARKER = "monkeys"
SWEEP_S = (
    0.1,
    0.4,
    0.8,
    1.0,
    1.3,
    2.0,
    2.6,
    3.0,
    4.5,
    7.9,
    12.0,
    21.0,
    28.0,
    29.5,
    29.99,
    30.0,
    30.01,
    30.5,
    31.0,
    33.3,
)
LONG_SWEEP_S = (44.0, 59.9, 60.0, 60.1, 75.5, 90.0, 101.0, 125.0)
HEARD_FROM_S = 1.0  # shorter cuts do not hold the whole marker word


def transcribe(
    model: LoadedModel, samples: Samples, options: Options | None = None, cutting: CutOptions | None = None
) -> Transcript:
    return Transcription(model, options or Options(), cutting or CutOptions()).run(wav(samples))


@pytest.fixture
def faked(
    vocabulary: Vocabulary, detector: SpeechDetector
) -> Iterator[Callable[[Script], tuple[FakeEngine, LoadedModel]]]:
    """A model with a scripted engine."""
    batchers: list[Batcher] = []

    def open_one(script: Script) -> tuple[FakeEngine, LoadedModel]:
        engine = FakeEngine(vocabulary, script)
        batchers.append(Batcher(engine, name="fake"))
        return engine, LoadedModel(name="fake", vocabulary=vocabulary, batcher=batchers[-1], detector=detector)

    yield open_one
    for batcher in batchers:
        batcher.close()


def ending_with_marker(clips: dict[str, Clip], duration_s: float) -> Samples:
    """Speech of exactly this length whose last second has the marker word."""
    marker = clips["monkeys"].samples()[: -round(0.12 * SAMPLE_RATE_HZ)]  # without the silence behind the word
    filler = np.concatenate([clips["instruct"].samples()] * 2)
    n_samples = round(duration_s * SAMPLE_RATE_HZ)
    if n_samples <= len(marker):
        return marker[-n_samples:]
    return np.concatenate([filler[: n_samples - len(marker)], marker])


@pytest.mark.parametrize("duration_s", SWEEP_S + LONG_SWEEP_S)
def test_the_last_word_is_never_lost(tiny: LoadedModel, clips: dict[str, Clip], duration_s: float) -> None:
    """Whatever the length, the word in the last second is in the transcript, at the end."""
    found = transcribe(tiny, ending_with_marker(clips, duration_s))
    assert found.duration_s == pytest.approx(duration_s, abs=0.001)
    if duration_s >= HEARD_FROM_S:
        assert plain(found.text).endswith(MARKER)
        assert found.segments[-1].end_s > duration_s - 2.0
    starts = [segment.start_s for segment in found.segments]
    assert starts == sorted(starts)
    assert all(0 <= segment.start_s <= segment.end_s <= duration_s + 0.001 for segment in found.segments)


@pytest.mark.parametrize("duration_s", [3.0, 30.5, 61.0])
def test_without_the_filter(tiny: LoadedModel, clips: dict[str, Clip], duration_s: float) -> None:
    """The word is in the transcript with the voice filter off, too."""
    found = transcribe(tiny, ending_with_marker(clips, duration_s), cutting=CutOptions(skip_silence=False))
    assert plain(found.text).endswith(MARKER)


@pytest.mark.parametrize("duration_s", [0.1, 29.9, 30.1, 90.0, 125.0])
def test_every_sample_reaches_the_engine(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]],
    vocabulary: Vocabulary,
    clips: dict[str, Clip],
    duration_s: float,
) -> None:
    """Without the filter the windows are the audio: no sample is missing or repeated, and no window exceeds 30 s."""
    engine, model = faked(lambda window: written(vocabulary, window, " hello"))
    samples = ending_with_marker(clips, duration_s)
    transcribe(model, samples, cutting=CutOptions(skip_silence=False))
    windows = [window.samples for window in sorted(engine.seen, key=lambda window: window.id)]
    assert all(0 < len(window) <= 30 * SAMPLE_RATE_HZ for window in windows)
    assert np.abs(np.concatenate(windows) - samples).max() < 1e-4


def test_a_text_that_was_stopped_early_is_retried(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """The engine's report of a loop causes a retry, whatever the figures are; engines get the threshold in effect."""

    def script(window: Window) -> Hypothesis:
        return replace(written(vocabulary, window, " hello"), looped=window.request.temperature < 0.4)

    engine, model = faked(script)
    found = transcribe(model, clips["monkeys"].samples(), Options(compression_ratio_threshold=2.0))
    assert [window.request.temperature for window in engine.seen] == [0.0, 0.2, 0.4]
    assert {window.request.compression_ratio_threshold for window in engine.seen} == {2.0}
    assert found.windows.retried == 2


def test_a_retry_has_the_number_of_its_audio(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """All decodings of one window have the number of the first one; another window has another number."""

    def script(window: Window) -> Hypothesis:
        good = window.request.temperature >= 0.4
        return written(vocabulary, window, " hello", avg_logprob=-0.2 if good else -2.0)

    engine, model = faked(script)
    transcribe(model, ending_with_marker(clips, 40.0), cutting=CutOptions(skip_silence=False))
    ids: dict[int | None, list[int]] = {}
    for window in engine.seen:
        ids.setdefault(window.audio, []).append(window.id)
    assert [len(found) for found in ids.values()] == [3, 3]
    assert all(min(found) == audio for audio, found in ids.items())


@pytest.mark.parametrize(
    "sound",
    [
        silence(0.05),
        silence(12.0),
        silence(70.0),
        noise(10.0, level=0.001),
        noise(35.0, level=0.05),
        noise(10.0, level=0.5),
        np.sin(2 * np.pi * 50 * np.arange(160_000) / SAMPLE_RATE_HZ).astype(np.float32) * 0.3,
        silence(60.0),
        noise(60.0, level=0.1),
        music(60.0),
    ],
    ids=[
        "blink",
        "silence",
        "long silence",
        "hiss",
        "noise",
        "loud noise",
        "hum",
        "60 s silence",
        "60 s noise",
        "60 s music",
    ],
)
def test_no_invention(tiny: LoadedModel, sound: Samples) -> None:
    """Silence, noise and music give no text."""
    assert transcribe(tiny, sound).text == ""


def test_long_speech_is_read(tiny: LoadedModel, clips: dict[str, Clip]) -> None:
    """Of 73 s of speech at most one word in ten differs from the reference, and times rise."""
    clip = clips["instruct"]
    with clip.path.open("rb") as file:
        found = Transcription(tiny, Options(), CutOptions()).run(file)
    expected, got = plain(clip.text).split(), set(plain(found.text).split())
    assert sum(word in got for word in expected) > 0.9 * len(expected)
    assert found.language == "en"
    assert found.windows.decoded >= 3


def test_word_times(tiny: LoadedModel, clips: dict[str, Clip]) -> None:
    """Words are the text, in order, inside their segments."""
    with clips["instruct"].path.open("rb") as file:
        found = Transcription(tiny, Options(word_timestamps=True), CutOptions()).run(file)
    for segment in found.segments:
        assert segment.words is not None
        assert "".join(word.text for word in segment.words).strip() == segment.text.strip()
        edges = [edge for word in segment.words for edge in (word.start_s, word.end_s)]
        assert edges == sorted(edges)
        assert segment.start_s <= edges[0]
        assert edges[-1] <= segment.end_s


def test_beside_each_other(tiny: LoadedModel, clips: dict[str, Clip]) -> None:
    """Requests that share batches get the results that they get alone."""
    order = ["monkeys", "instruct", "agent", "monkeys", "agent"]

    def one(name: str) -> str:
        with clips[name].path.open("rb") as file:
            return Transcription(tiny, Options(), CutOptions()).run(file).text

    alone = {name: plain(one(name)) for name in set(order)}
    with ThreadPoolExecutor(len(order)) as pool:
        together = list(pool.map(one, order))
    assert [plain(text) for text in together] == [alone[name] for name in order]


def test_prompt(tiny: LoadedModel, clips: dict[str, Clip]) -> None:
    """A prompt reaches the model, which spells a name as the prompt does."""
    with clips["instruct"].path.open("rb") as file:
        found = Transcription(tiny, Options(prompt="ASTERISK. DIAL. VOICEMAIL."), CutOptions()).run(file)
    assert found.text != ""
    with pytest.raises(RequestError, match="does not speak 'fr'"):
        Transcription(tiny, Options(language="fr"), CutOptions())


def test_hints_that_the_model_lacks(tiny: LoadedModel) -> None:
    """A language that the model lacks is left out of the hints with a warning, as long as one remains."""
    options, warnings = usable(tiny, Options(languages=("de", "en", "ga")))
    assert (options.language, options.languages) == ("en", ())
    assert ["'de'" in warnings[0], "'ga'" in warnings[1], len(warnings)] == [True, True, 2]
    assert transcribe(tiny, silence(1.0), Options(languages=("de", "en"))).warnings == warnings[:1]
    assert usable(tiny, Options(languages=("en",))) == (Options(language="en"), ())
    with pytest.raises(RequestError, match="does not speak 'de'"):
        usable(tiny, Options(languages=("de", "fr")))


def test_token_scores(tiny: LoadedModel, clips: dict[str, Clip]) -> None:
    """The tokens' bytes are the text, and each has a log probability; words come only when requested."""
    with clips["monkeys"].path.open("rb") as file:
        found = Transcription(tiny, Options(token_scores=True), CutOptions()).run(file)
    for segment in found.segments:
        assert segment.words is None
        assert segment.scores is not None
        assert b"".join(score.data for score in segment.scores).decode() == segment.text
        assert all(-25 < score.logprob <= 0 for score in segment.scores)


def test_hotwords(vocabulary: Vocabulary) -> None:
    """Hotwords come before the prompt and leave it at least half of the room; the end of the prompt is kept."""
    only = prompt_tokens(vocabulary, Options(hotwords=("Asterisk", "PBX")))
    assert vocabulary.decode(only) == " Asterisk, PBX"
    both = prompt_tokens(vocabulary, Options(hotwords=("PBX",) * 300, prompt="word " * 400 + "the end"))
    assert len(both) == PROMPT_TOKENS_MAX
    text = vocabulary.decode(both)
    assert text.startswith(" PBX, PBX")
    assert text.endswith("word the end")
    assert prompt_tokens(vocabulary, Options()) == ()


LOOP = " again and again" * 40


def test_a_loop_is_decoded_again(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """A window that loops is decoded at the next temperature, alone; the good attempt is kept."""

    def script(window: Window) -> Hypothesis:
        looping = window.request.temperature < 0.4
        return written(vocabulary, window, LOOP if looping else " a good text")

    engine, model = faked(script)
    found = transcribe(model, clips["monkeys"].samples())
    assert found.text == "a good text"
    assert [window.request.temperature for window in engine.seen] == [0.0, 0.2, 0.4]
    assert found.segments[0].temperature == 0.4
    assert (found.windows.decoded, found.windows.retried) == (3, 2)


def test_the_best_of_bad_attempts(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """When all attempts fail, the most probable one that does not loop is kept, so that no text is dropped."""
    answers = {0.0: (LOOP, -0.1), 0.2: (" unsure", -1.2), 0.4: (" very unsure", -3.0)}

    def script(window: Window) -> Hypothesis:
        text, avg_logprob = answers[window.request.temperature]
        return written(vocabulary, window, text, avg_logprob=avg_logprob)

    _, model = faked(script)
    found = transcribe(model, clips["monkeys"].samples(), Options(temperatures=(0.0, 0.2, 0.4)))
    assert found.text == "unsure"


def test_silence_by_the_model(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """A window that the model itself classifies as silence is dropped without a second attempt."""
    engine, model = faked(lambda w: written(vocabulary, w, " Thank you.", avg_logprob=-1.4, no_speech_prob=0.9))
    found = transcribe(model, clips["monkeys"].samples())
    assert found.text == ""
    assert found.windows.dropped == len(engine.seen) == 1


def test_echo_of_the_hotwords(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """A window with only the hotwords as its text is decoded again without them, and so is the rest of it."""

    def script(window: Window) -> Hypothesis:
        return written(vocabulary, window, " Grafana Terraform." if window.request.prompt_tokens else " monkeys")

    engine, model = faked(script)
    found = transcribe(model, clips["monkeys"].samples(), Options(hotwords=("Terraform", "Grafana"), prompt="Why?"))
    assert (found.text, found.windows.retried, len(engine.seen)) == ("monkeys", 1, 2)


def test_unread_speech_is_continued(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """Where the model stops in the middle of speech, the rest becomes a window of its own."""

    def script(window: Window) -> Hypothesis:
        return written(vocabulary, window, " part", end_s=min(5.0, len(window.samples) / SAMPLE_RATE_HZ))

    _, model = faked(script)
    found = transcribe(model, clips["instruct"].samples()[: 20 * SAMPLE_RATE_HZ])
    assert found.windows.continued >= 2
    ends = [segment.end_s for segment in found.segments]
    assert ends == sorted(ends)
    assert ends[-1] > 18.0


def test_order_and_progress(tiny: LoadedModel, clips: dict[str, Clip]) -> None:
    """Segments are reported in order during the run, and progress rises to the end."""
    segments: list[float] = []
    progress: list[tuple[float, float | None]] = []
    listener = Listener(
        on_segment=lambda segment: segments.append(segment.start_s),
        on_progress=lambda done_s, total_s: progress.append((done_s, total_s)),
    )
    with clips["instruct"].path.open("rb") as file:
        found = Transcription(tiny, Options(), CutOptions(), listener=listener).run(file)
    assert segments == [segment.start_s for segment in found.segments] == sorted(segments)
    assert [done_s for done_s, _ in progress] == sorted(done_s for done_s, _ in progress)
    assert progress[-1][0] == pytest.approx(73.3, abs=1.0)
    assert progress[-1][1] == pytest.approx(73.35, abs=0.01)


def test_cancel(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """A cancelled request ends with Cancelled, and its windows leave the engine."""
    started, gate = threading.Event(), threading.Event()

    def script(window: Window) -> Hypothesis:
        started.set()
        gate.wait(5)
        return written(vocabulary, window, " hello")

    _, model = faked(script)
    job = Transcription(model, Options(), CutOptions())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job.run, wav(clips["instruct"].samples()))
        started.wait(5)
        job.cancel()
        gate.set()
        with pytest.raises(Cancelled):
            running.result(10)
    assert model.batcher.load.waiting == 0


def test_bulk_by_length(
    faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], vocabulary: Vocabulary, clips: dict[str, Clip]
) -> None:
    """Long audio is bulk, short audio is not, and a request may override this; its length is reported first."""
    long, short = np.concatenate([clips["instruct"].samples()] * 2), clips["monkeys"].samples()
    for samples, asked, lanes in (
        (long, None, {"bulk"}),
        (short, None, {"interactive"}),
        (long, False, {"interactive"}),
        (short, True, {"bulk"}),
    ):
        lengths: list[float] = []
        engine, model = faked(lambda window: written(vocabulary, window, " hello"))
        listener = Listener(on_length=lengths.append)
        Transcription(model, Options(), CutOptions(), listener=listener, bulk=asked).run(wav(samples))
        assert {window.lane for window in engine.seen} == lanes
        assert lengths == [pytest.approx(len(samples) / SAMPLE_RATE_HZ)]


def test_halved_batches_are_counted(vocabulary: Vocabulary, detector: SpeechDetector, clips: dict[str, Clip]) -> None:
    """A request whose batches did not fit succeeds and reports this."""
    queued = threading.Event()

    class Counting(Batcher):
        n_windows = 0

        def enqueue(
            self, ticket: Ticket, samples: NDArray[np.float32], request: DecodeRequest, *, again: int | None
        ) -> int:
            self.n_windows += 1
            if self.n_windows == 4:
                queued.set()
            return super().enqueue(ticket, samples, request, again=again)

    def script(window: Window) -> Hypothesis:
        assert queued.wait(60)  # until windows queue up behind the first one, so that a batch has several
        return written(vocabulary, window, " hello")

    batcher = Counting(FakeEngine(vocabulary, script, room=1), name="cramped")
    try:
        model = LoadedModel(name="cramped", vocabulary=vocabulary, batcher=batcher, detector=detector)
        long = np.concatenate([clips["instruct"].samples()] * 3)
        found = Transcription(model, Options(), CutOptions()).run(wav(long))
    finally:
        batcher.close()
    assert len(found.segments) > 4
    assert found.windows.halved >= 1


def test_errors(faked: Callable[[Script], tuple[FakeEngine, LoadedModel]], clips: dict[str, Clip]) -> None:
    """A failing engine, unreadable audio and audio over the limit raise their own errors."""
    _, model = faked(lambda _: RuntimeError("boom"))
    with pytest.raises(EngineError, match="boom"):
        transcribe(model, clips["monkeys"].samples())
    with pytest.raises(AudioError):
        Transcription(model, Options(), CutOptions()).run(io.BytesIO(b"no audio"))
    with pytest.raises(AudioTooLong):
        Transcription(model, Options(), CutOptions(), max_audio_s=1.0).run(wav(silence(30.0)))
