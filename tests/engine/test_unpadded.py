"""Short audio without its padding gives the same words with less work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.test_contract import decode
from tests.support.speech import Clip, plain
from whisperd.engine.base import DecodeRequest, Window
from whisperd.engine.cpu.unpadded import STATES, TAIL_STATES, ShortWindows, frames_of, is_doubtful, joined, may_be_short
from whisperd.engine.factory import EngineSettings, open_engine
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import WINDOW_SAMPLES


def window(n_samples: int) -> Window:
    return Window(id=0, samples=np.zeros(n_samples, np.float32), request=DecodeRequest())


def rows(lengths: list[int]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return [np.full((1, n, 2), index + 1, np.float32) for index, n in enumerate(lengths)]


@given(st.integers(1, WINDOW_SAMPLES))
def test_no_audio_is_left_out(n_samples: int) -> None:
    """The encoded length covers all of the audio and some silence, in whole seconds, or is the whole window."""
    frames = frames_of(window(n_samples))
    assert frames % 100 == 0
    assert frames == 3000 or frames * 160 >= n_samples + 2 * 16_000


@given(st.lists(st.integers(1, STATES), min_size=1, max_size=5))
def test_every_row_keeps_its_states_and_ends_quietly(lengths: list[int]) -> None:
    """Rows of any lengths make one batch; each begins with its own states and ends with the silence's last ones."""
    quiet = -np.arange(STATES, dtype=np.float32).repeat(2).reshape(1, STATES, 2)
    batch = joined(rows(lengths), quiet)
    assert batch.shape[1] == min(STATES, max(lengths) + TAIL_STATES) or max(lengths) == STATES == batch.shape[1]
    for index, n_states in enumerate(lengths):
        assert (batch[index, :n_states] == index + 1).all()
        n_quiet = batch.shape[1] - n_states
        assert (batch[index, n_states:] == quiet[0, STATES - n_quiet :]).all()


def test_only_where_it_was_measured() -> None:
    """The language must be known; "auto" applies only to a small English-only model."""
    assert may_be_short("auto", "en", 384, multilingual=False)
    assert not may_be_short("auto", "en", 768, multilingual=False)
    assert not may_be_short("auto", "en", 384, multilingual=True)
    assert may_be_short("always", "ja", 1280, multilingual=True)
    assert not may_be_short("always", None, 384, multilingual=True)
    assert not may_be_short("never", "en", 384, multilingual=False)


def test_doubtful_texts() -> None:
    """A text that loops, is too long for the audio, unlikely, or ends too late is doubtful; a sentence is not."""
    assert is_doubtful("the second is " * 20, -0.2, 9.0, window(16_000 * 10))
    assert is_doubtful("all of these words in half a second cannot be, whoever speaks them", -0.2, 0.5, window(8_000))
    assert is_doubtful("They have been carried away by monkeys.", -1.2, 2.0, window(16_000 * 3))
    assert is_doubtful("They have been carried away by monkeys.", -0.2, 9.0, window(16_000 * 3))
    assert not is_doubtful("They have been carried away by monkeys.", -0.2, 3.0, window(16_000 * 3))
    assert not is_doubtful("", -0.2, 0.0, window(16_000))


def test_the_same_words(snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip], tmp_path: Path) -> None:
    """Real speech reads the same with the option and without it, with times for every word."""
    texts = []
    use: ShortWindows
    for use in ("never", "auto"):
        engine = open_engine(snapshot, vocabulary, EngineSettings(short_windows=use), tmp_path)
        try:
            for key in ("monkeys", "agent"):
                found = decode(engine, clips[key].samples(), DecodeRequest(word_timestamps=True))
                texts.append(plain(vocabulary.decode([token for token in found.tokens if token < vocabulary.eot])))
                assert found.alignment
        finally:
            engine.close()
    assert texts[:2] == texts[2:] == [plain(clips[key].text) for key in ("monkeys", "agent")]
