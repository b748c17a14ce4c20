"""Reads a snapshot in either format: the sizes of the model, the suppressed ids, its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisperd.engine.checkpoints import ctranslate2 as ct2file
from whisperd.engine.checkpoints.safetensors import (
    BLANK_TOKEN,
    Tensors,
    is_ctranslate2,
    is_huggingface,
    json_object,
    tensors,
)
from whisperd.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of one Whisper. ``frames``: encoder states of 30 s. ``positions``: the longest text with its prefix."""

    width: int
    encoder_layers: int
    encoder_heads: int
    decoder_layers: int
    decoder_heads: int
    n_mels: int
    vocabulary_size: int
    frames: int = 1500
    positions: int = 448
    feed_forward: int = 0  # 0: four times the width, as in every release

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers."""
        return self.feed_forward or 4 * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model on disk; ``tensors`` have the names of transformers.

    ``alignment_heads`` are (layer, head) of the decoder that follow the audio. ``suppressed`` ids are never written,
    ``suppressed_first`` not as the first token.
    """

    shape: Shape
    tensors: Tensors
    alignment_heads: tuple[tuple[int, int], ...]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]


def read(snapshot: Path) -> Checkpoint:
    """A snapshot in either format; raises SourceError when it is not a whole Whisper."""
    try:
        if is_ctranslate2(snapshot):
            return _from_ctranslate2(snapshot)
        if is_huggingface(snapshot):
            return _from_huggingface(snapshot)
    except KeyError as error:
        raise SourceError(f"{snapshot} is not a whole Whisper checkpoint: {error.args[0]} is missing") from error
    raise SourceError(
        f"{snapshot} holds no Whisper model; expected model.bin (CTranslate2) or "
        "config.json with model.safetensors (Hugging Face)"
    )


def _from_ctranslate2(snapshot: Path) -> Checkpoint:
    stored = ct2file.variables(snapshot / "model.bin")
    config = json_object(snapshot / "config.json")
    found = ct2file.tensors(stored)
    shape = _shape(found, int(stored["encoder/num_heads"]), int(stored["decoder/num_heads"]))
    return Checkpoint(
        shape=shape,
        tensors=found,
        alignment_heads=_heads(config.get("alignment_heads"), shape),
        suppressed=tuple(config.get("suppress_ids") or ()),
        suppressed_first=tuple(config.get("suppress_ids_begin") or ()),
    )


def _from_huggingface(snapshot: Path) -> Checkpoint:
    config, generation = json_object(snapshot / "config.json"), json_object(snapshot / "generation_config.json")
    if config.get("model_type") != "whisper":
        raise SourceError(f"{snapshot} holds a model of type {config.get('model_type')!r}, expected 'whisper'")
    merged = {**config, **{key: value for key, value in generation.items() if value is not None}}
    found = tensors(snapshot)
    shape = _shape(found, config["encoder_attention_heads"], config["decoder_attention_heads"])
    return Checkpoint(
        shape=shape,
        tensors=found,
        alignment_heads=_heads(merged.get("alignment_heads"), shape),
        suppressed=tuple(merged.get("suppress_tokens") or ()),
        suppressed_first=tuple(merged.get("begin_suppress_tokens") or (BLANK_TOKEN, config["eos_token_id"])),
    )


def _shape(found: Tensors, encoder_heads: int, decoder_heads: int) -> Shape:
    vocabulary_size, width = found["model.decoder.embed_tokens.weight"].shape
    return Shape(
        width=width,
        encoder_layers=_layers(found, "encoder"),
        encoder_heads=encoder_heads,
        decoder_layers=_layers(found, "decoder"),
        decoder_heads=decoder_heads,
        n_mels=found["model.encoder.conv1.weight"].shape[1],
        vocabulary_size=vocabulary_size,
        frames=len(found["model.encoder.embed_positions.weight"]),
        positions=len(found["model.decoder.embed_positions.weight"]),
        feed_forward=len(found["model.decoder.layers.0.fc1.bias"]),
    )


def _layers(names: Iterable[str], side: str) -> int:
    found = (re.match(rf"model\.{side}\.layers\.(\d+)\.", name) for name in names)
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise KeyError(f"model.{side}.layers.0")
    return 1 + max(numbers)


def _heads(listed: Any, shape: Shape) -> tuple[tuple[int, int], ...]:
    """The listed heads, else all of the decoder's upper half, as in openai-whisper."""
    if listed:
        return tuple((int(layer), int(head)) for layer, head in listed)
    layers = range(shape.decoder_layers // 2, shape.decoder_layers)
    return tuple((layer, head) for layer in layers for head in range(shape.decoder_heads))
