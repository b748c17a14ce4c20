"""Whisper models with random weights: true sizes for measurements without a model, small ones for tests.

Such weights never end a text by themselves. ``written`` makes a model on disk that does, after so many tokens, for
systems that cannot be told a length: positions are given an embedding that outweighs everything else.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.checkpoints import Checkpoint, Shape
from whisperd.speech.tokenizer import Vocabulary

SPREAD = 0.02
LOUD = 40.0  # the size of such an embedding: 32 layers add less to it
TOKENS, POSITIONS = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"


def _shape(width: int, layers: tuple[int, int], n_mels: int, vocabulary_size: int, head_width: int = 64) -> Shape:
    return Shape(
        width=width,
        encoder_layers=layers[0],
        encoder_heads=width // head_width,
        decoder_layers=layers[1],
        decoder_heads=width // head_width,
        n_mels=n_mels,
        vocabulary_size=vocabulary_size,
    )


SHAPES = {
    "large-v3": _shape(1280, (32, 32), 128, 51866),
    "large-v3-turbo": _shape(1280, (32, 4), 128, 51866),
    "distil-large-v3": _shape(1280, (32, 2), 128, 51866),
    "medium": _shape(1024, (24, 24), 80, 51865),
    "small": _shape(768, (12, 12), 80, 51865),
    "base": _shape(512, (6, 6), 80, 51865),
    "tiny": _shape(384, (4, 4), 80, 51865),
    "smoke": _shape(32, (1, 2), 80, 51864, head_width=16),
}


def drawn(shape: Shape, *, seed: int = 0, spread: float = SPREAD) -> Checkpoint:
    """Draws normal weights, with initial normalisations. Never zeros: they multiply faster on some devices."""
    generator = np.random.default_rng(seed)
    upper = range(shape.decoder_layers // 2, shape.decoder_layers)
    return Checkpoint(
        shape=shape,
        tensors={name: _tensor(generator, name, size, spread) for name, size in _sizes(shape)},
        alignment_heads=tuple((layer, head) for layer in upper for head in range(min(2, shape.decoder_heads))),
        suppressed=(),
        suppressed_first=(),
    )


def _tensor(generator: np.random.Generator, name: str, size: tuple[int, ...], spread: float) -> NDArray[np.float32]:
    if "layer_norm" in name:
        return np.full(size, 1.0 if name.endswith("weight") else 0.0, np.float32)
    values: NDArray[np.float32] = generator.standard_normal(size, np.float32) * np.float32(spread)
    return values


def _sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = shape.width
    yield from _affine("model.encoder.conv1", width, shape.n_mels, 3)
    yield from _affine("model.encoder.conv2", width, width, 3)
    yield "model.encoder.embed_positions.weight", (shape.frames, width)
    yield "model.decoder.embed_positions.weight", (shape.positions, width)
    yield "model.decoder.embed_tokens.weight", (shape.vocabulary_size, width)
    for side, n_layers in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers)):
        yield from _affine(f"model.{side}.layer_norm", width)
        for index in range(n_layers):
            yield from _layer(f"model.{side}.layers.{index}", shape, crossed=side == "decoder")


def _layer(name: str, shape: Shape, *, crossed: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for attention in ("self_attn", "encoder_attn") if crossed else ("self_attn",):
        yield from _affine(f"{name}.{attention}_layer_norm", shape.width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes = _affine(f"{name}.{attention}.{part}", shape.width, shape.width)
            yield from (pair for pair in sizes if not pair[0].endswith("k_proj.bias"))
    yield from _affine(f"{name}.final_layer_norm", shape.width)
    yield from _affine(f"{name}.fc1", shape.hidden, shape.width)
    yield from _affine(f"{name}.fc2", shape.width, shape.hidden)


def _affine(name: str, *size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", size
    yield f"{name}.bias", size[:1]


def ending(found: Checkpoint, vocabulary: Vocabulary, n_tokens: int) -> Checkpoint:
    """The same model, whose texts are two timestamps around ``n_tokens - 2`` tokens, when the prefix is one token."""
    tokens, positions = found.tensors[TOKENS].copy(), found.tensors[POSITIONS].copy()
    begin, last = vocabulary.timestamp_begin, vocabulary.timestamp_begin + 1500
    end_mark, last_mark, mark = np.random.default_rng(1).standard_normal((3, found.shape.width)).astype(np.float32)
    tokens[begin:] = (
        tokens[begin:] + mark
    )  # timestamps lie in one direction, as do ids that the tokenizer does not know
    tokens[last], tokens[vocabulary.eot] = last_mark, end_mark
    positions[: n_tokens - 1] = -LOUD * (mark + end_mark + last_mark)
    positions[n_tokens - 1] = LOUD * last_mark
    positions[n_tokens:] = LOUD * end_mark
    return replace(found, tensors={**found.tensors, TOKENS: tokens, POSITIONS: positions})


def written(found: Checkpoint, tokenizer: Path, target: Path, *, n_tokens: int) -> Path:
    """A snapshot in the layout of transformers, float16, with the tokenizer of another; its texts have a length."""
    vocabulary = Vocabulary.load(tokenizer)
    model = ending(found, vocabulary, n_tokens)
    shape = found.shape
    target.mkdir(parents=True)
    shutil.copy(tokenizer / "tokenizer.json", target)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocabulary.eot)
    config = {
        "model_type": "whisper",
        "vocab_size": shape.vocabulary_size,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "encoder_attention_heads": shape.encoder_heads,
        "decoder_attention_heads": shape.decoder_heads,
        "d_model": shape.width,
        "encoder_ffn_dim": shape.hidden,
        "decoder_ffn_dim": shape.hidden,
        "num_mel_bins": shape.n_mels,
        "decoder_start_token_id": vocabulary.sot,
        **ends,
    }
    generation = {"alignment_heads": [list(pair) for pair in found.alignment_heads], "begin_suppress_tokens": []}
    (target / "config.json").write_text(json.dumps(config))
    (target / "generation_config.json").write_text(json.dumps(generation))
    _write_safetensors(target / "model.safetensors", model.tensors)
    return target


def _write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.size]}
        at += 2 * tensor.size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.astype("<f2").tobytes())
