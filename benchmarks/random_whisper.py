"""Whisper with weights drawn by chance: true sizes to measure with where there is no model, small ones for tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.checkpoint import Checkpoint, Shape

SPREAD = 0.02


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
    """Normal weights; normalisations as they start. Never zeros: they multiply faster on some devices."""
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
