"""Token ids come from the model; text, prompts and words follow openai-whisper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.errors import SourceError
from whisperd.speech.tokenizer import PROMPT_TOKENS_MAX, Vocabulary


def multilingual(snapshot: Path, target: Path) -> Vocabulary:
    """The embedded tokenizer with one id more, as the multilingual models have it."""
    tokenizer = json.loads((snapshot / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["id"] += 1
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<|one more|>"] = vocabulary.pop("<|endoftext|>")
    tokenizer["post_processor"] = None
    (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (target / "config.json").write_text('{"vocab_size": 51865}')
    return Vocabulary.load(target)


def test_english_only(vocabulary: Vocabulary) -> None:
    """tiny.en has 51,864 ids, one language and a start sequence of one token."""
    assert (vocabulary.size, vocabulary.multilingual) == (51_864, False)
    assert list(vocabulary.languages) == ["en"]
    assert vocabulary.prefix("transcribe", "en") == [vocabulary.sot]
    assert vocabulary.timestamp_begin == 50_363


def test_multilingual(snapshot: Path, tmp_path: Path) -> None:
    """A multilingual model gets the language and the task as tokens; Hebrew has its present code."""
    vocabulary = multilingual(snapshot, tmp_path)
    assert vocabulary.multilingual
    assert "he" in vocabulary.languages
    assert "iw" not in vocabulary.languages
    assert len(vocabulary.languages) == 99
    french = vocabulary.languages["fr"]
    assert vocabulary.prefix("translate", "fr", [5, 6]) == [
        vocabulary.sot_prev, 5, 6, vocabulary.sot, french, vocabulary.translate,
    ]  # fmt: skip


def test_a_long_prompt_keeps_its_end(vocabulary: Vocabulary) -> None:
    """Of a prompt that is too long the last tokens are kept."""
    prefix = vocabulary.prefix("transcribe", "en", range(1000))
    assert len(prefix) == PROMPT_TOKENS_MAX + 2
    assert prefix[-2] == 999


@given(text=st.text(max_size=60))
def test_text_survives(vocabulary: Vocabulary, text: str) -> None:
    """Any text is decoded from its tokens, and the words are exactly the text."""
    tokens = vocabulary.encode(text)
    if all(token < vocabulary.eot for token in tokens):
        assert vocabulary.decode(tokens) == text
        words = vocabulary.split_words(tokens, "en")
        assert [token for _, part in words for token in part] == list(tokens)
        assert "".join(word for word, _ in words) == text


def test_words(vocabulary: Vocabulary) -> None:
    """Words keep their space, punctuation is its own piece, and characters of several tokens stay whole."""
    words = vocabulary.split_words(vocabulary.encode(" It's naïve, 日本!"), "en")
    assert [text for text, _ in words] == [" It's", " naïve", ",", " 日本", "!"]
    assert [text for text, _ in vocabulary.split_words(vocabulary.encode("日本"), "ja")] == ["日", "本"]


def test_special_tokens_are_no_text(vocabulary: Vocabulary) -> None:
    """Timestamps and special tokens are removed from text, also where a user writes them into a prompt."""
    tokens = [vocabulary.timestamp_begin, *vocabulary.encode(" hello"), vocabulary.timestamp_begin + 50]
    assert vocabulary.decode(tokens) == " hello"


@pytest.mark.parametrize("content", [None, "{", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_not_a_tokenizer(snapshot: Path, tmp_path: Path, content: str | None) -> None:
    """A missing, broken or foreign tokenizer.json is a SourceError that names the file."""
    shutil.copy(snapshot / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize("text", [" hello", " Zoë naïve", " 日本語", " 🙂 ok", "\n\ttab"])
def test_token_bytes(vocabulary: Vocabulary, text: str) -> None:
    """The bytes of the tokens are those of the text, even where a token ends inside a character."""
    assert b"".join(map(vocabulary.token_bytes, vocabulary.encode(text))) == text.encode()
