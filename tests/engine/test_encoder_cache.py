"""Encoder states that are kept on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.test_contract import decode
from tests.support.speech import Clip
from whisperd.engine.base import DecodeRequest
from whisperd.engine.cpu.encoder import EncoderCache
from whisperd.engine.cpu.engine import Ct2Engine
from whisperd.engine.cpu.unpadded import ShortWindows
from whisperd.speech.tokenizer import Vocabulary


@given(st.integers(1, 4), st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 6)), st.sampled_from([100, 3000]))))
def test_the_last_ones_are_kept(most: int, audios: list[tuple[int | None, int]]) -> None:
    """The last states are kept, up to the limit, each under its own number; audio without a number is never kept."""
    kept = EncoderCache(most)
    for place, (audio, n_frames) in enumerate(audios):
        kept.put(audio, n_frames, np.full((1, 1, 1), place, np.float32))
    assert kept.get(None, 3000) is None
    put = {key: place for place, key in enumerate(audios) if key[0] is not None}
    there = {key for key in put if kept.get(*key) is not None}
    assert len(there) == min(most, len(put))
    assert all(float(kept.get(*key)[0, 0, 0]) == put[key] for key in there)  # type: ignore[index]


class Counting:
    """A real model that counts what it encodes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, features: Any) -> Any:
        self.encoded += 1
        return self._model.encode(features)


@pytest.mark.parametrize("short_windows", ["never", "always"])
def test_encoded_once(
    snapshot: Path, vocabulary: Vocabulary, clips: dict[str, Clip], short_windows: ShortWindows
) -> None:
    """Audio that comes again is not encoded again, until other audio has replaced it."""
    model = Counting(ctranslate2.models.Whisper(str(snapshot), device="cpu", compute_type="int8"))
    engine = Ct2Engine(model, vocabulary, batch_size=2, workers=1, short_windows=short_windows)
    speech = clips["monkeys"].samples()
    texts, n_more = [], 2 * (short_windows == "always")  # the quiet window, and a second that tells the width
    try:
        for audio, expected in ((1, 1), (1, 1), (2, 2), (1, 2), (3, 3), (4, 4), (1, 5), (None, 6), (None, 7)):
            texts.append(decode(engine, speech, DecodeRequest(), audio=audio).tokens)
            assert model.encoded == expected + n_more, audio
    finally:
        engine.close()
    assert len(set(texts)) == 1
