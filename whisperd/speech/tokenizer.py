"""Whisper's tokens: special ids, prompts, text. Home of tokenizers.

Every id is read from the model's own ``tokenizer.json``: releases of Whisper differ in their languages and thus in all
ids behind them.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whisperd.errors import SourceError
from whisperd.speech.languages import LANGUAGES
from whisperd.speech.transcript import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MULTILINGUAL_SIZE = 51_865  # English-only vocabularies have one id less; openai-whisper decides by this too
PROMPT_TOKENS_MAX = 223  # half of the decoder's 448 positions less <|startofprev|>
TIMESTAMP_TOKENS = 1501  # 0.00 to 30.00 s
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
OLD_CODES = {"iw": "he"}  # the first release names Hebrew by its old code
REPLACEMENT = "\ufffd"  # what a decoder puts where bytes do not make a character yet


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a character that can be seen, as GPT-2's ``bytes_to_unicode`` does."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


BYTE_OF: Mapping[str, int] = _byte_alphabet()


class Vocabulary:
    """The tokens of one model; made by ``load``. Safe to share among threads.

    Args:
        tokenizer: byte-level BPE with Whisper's special tokens.
        size: number of output ids of the model.
        place: where it came from, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, place: str) -> None:
        self._tokenizer = tokenizer
        self._place = place
        self.size = size
        self.multilingual = size >= MULTILINGUAL_SIZE
        self.eot = self._id("<|endoftext|>")
        self.sot = self._id("<|startoftranscript|>")
        self.sot_prev = self._id("<|startofprev|>")
        self.transcribe = self._id("<|transcribe|>")
        self.translate = self._id("<|translate|>")
        self.no_speech = self._id("<|nospeech|>", "<|nocaptions|>")  # one id, renamed between releases
        self.no_timestamps = self._id("<|notimestamps|>")
        self.timestamp_begin = self.no_timestamps + 1  # older tokenizer files do not list the timestamps
        self.languages: Mapping[str, int] = self._language_ids() if self.multilingual else {"en": -1}
        if self.timestamp_begin + TIMESTAMP_TOKENS > size:
            raise SourceError(f"{place} does not fit its model: {size} output ids leave no room for timestamps")

    @classmethod
    def load(cls, snapshot: Path) -> Vocabulary:
        """Reads the tokenizer of a model directory; raises SourceError when it is missing or not Whisper's."""
        from tokenizers import Tokenizer

        path = snapshot / "tokenizer.json"
        if not path.is_file():
            raise SourceError(f"{path} is missing: a Whisper model directory needs its tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for anything that it cannot parse
            raise SourceError(f"{path} cannot be read: {error}") from error
        return cls(tokenizer, _output_size(snapshot, tokenizer), str(path))

    def encode(self, text: str) -> tuple[int, ...]:
        """Text to ids, without any special token."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids to text; special tokens and timestamps are left out."""
        text: str = self._tokenizer.decode([token for token in tokens if token < self.eot])
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one text token stands for; they may end in the middle of a character."""
        return bytes(map(BYTE_OF.__getitem__, self._tokenizer.id_to_token(token) or ""))

    def prefix(self, task: Task, language: str, prompt_tokens: Sequence[int] = ()) -> list[int]:
        """What the decoder is shown before it writes: the prompt's end, start, language and task."""
        previous = [self.sot_prev, *prompt_tokens[-PROMPT_TOKENS_MAX:]] if prompt_tokens else []
        return [*previous, *self.start(task, language)]

    def start(self, task: Task, language: str) -> list[int]:
        """The start sequence without a prompt; English-only models have neither language nor task."""
        if not self.multilingual:
            return [self.sot]
        return [self.sot, self.languages[language], self.translate if task == "translate" else self.transcribe]

    def split_words(self, tokens: Sequence[int], language: str) -> list[tuple[str, tuple[int, ...]]]:
        """Text tokens to words with their tokens, as in openai-whisper's ``split_to_word_tokens``."""
        characters = self._split_characters(tokens)
        if language in WITHOUT_SPACES:
            return characters
        words: list[tuple[str, tuple[int, ...]]] = []
        for text, ids in characters:
            if not words or text.startswith(" ") or text.strip() in string.punctuation:
                words.append((text, ids))
            else:
                words[-1] = (words[-1][0] + text, words[-1][1] + ids)
        return words

    def _split_characters(self, tokens: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
        """The shortest runs of tokens that decode to whole characters; a broken end stays one run."""
        runs: list[tuple[str, tuple[int, ...]]] = []
        whole = self.decode(tokens)
        waiting: list[int] = []
        position = 0
        for token in tokens:
            waiting.append(token)
            text = self.decode(waiting)
            at = text.find(REPLACEMENT)
            # a replacement that the whole text has at the same place is really there
            if at < 0 or whole[position + at : position + at + 1] == REPLACEMENT:
                runs.append((text, tuple(waiting)))
                position += len(text)
                waiting = []
        if waiting:
            runs.append((self.decode(waiting), tuple(waiting)))
        return runs

    def _id(self, *names: str) -> int:
        for name in names:
            found = self._tokenizer.token_to_id(name)
            if found is not None:
                return int(found)
        raise SourceError(f"{self._place} is not a Whisper tokenizer: it has no {names[0]}")

    def _language_ids(self) -> dict[str, int]:
        codes = [*LANGUAGES, *OLD_CODES]
        found = {code: self._tokenizer.token_to_id(f"<|{code}|>") for code in codes}
        return {OLD_CODES.get(code, code): token for code, token in found.items() if token is not None}


def _output_size(snapshot: Path, tokenizer: Tokenizer) -> int:
    """How many ids the model can write: what it declares, else what its vocabulary file lists."""
    for name, read in (("config.json", _declared_size), ("vocabulary.json", _json_size), ("vocabulary.txt", _txt_size)):
        path = snapshot / name
        size = read(path) if path.is_file() else None
        if size:
            return size
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _declared_size(path: Path) -> int | None:
    try:
        size = json.loads(path.read_bytes()).get("vocab_size")
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    return int(size) if size else None


def _json_size(path: Path) -> int | None:
    try:
        return len(json.loads(path.read_bytes()))
    except ValueError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _txt_size(path: Path) -> int | None:
    data = path.read_bytes()
    return data.count(b"\n") + (not data.endswith(b"\n"))
