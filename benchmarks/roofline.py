"""The least time that hardware needs for one window, from its products and from the bytes it reads for each token.

Encoder: its products at the peak rate. Decoder: its weights, shared by a batch, and for each window the keys and values
of the audio and of the text so far, all read once for each token.
"""

from __future__ import annotations

from dataclasses import dataclass

from whisperd.engine.checkpoints import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Peaks of one device: products and sums each second, bytes each second."""

    flops_per_s: float
    bytes_per_s: float


H200 = Device(flops_per_s=790e12, bytes_per_s=4.3e12)  # the highest rates that were measured on one, in bfloat16


def encoder_flops(shape: Shape) -> float:
    """Products and sums for one window, keys and values of the decoder's layers included."""
    width, frames = shape.width, shape.frames
    convolutions = 2 * (2 * frames) * shape.n_mels * 3 * width + 2 * frames * width * 3 * width
    layers = shape.encoder_layers * (24 * width * width * frames + 4 * frames * frames * width)
    return float(convolutions + layers + shape.decoder_layers * 4 * width * width * frames)


def window_s(
    shape: Shape, device: Device, *, batch: int, n_tokens: float, prefix: int = 4, item_bytes: int = 2
) -> float:
    """Seconds for one window of a batch that writes so many tokens each."""
    weights = shape.decoder_layers * 14 * shape.width**2 + shape.vocabulary_size * shape.width
    audio_bytes = 2 * shape.frames * shape.width * shape.decoder_layers * item_bytes
    text_bytes = 2 * shape.width * shape.decoder_layers * item_bytes * (prefix + n_tokens / 2)
    shared_s = max(weights * item_bytes / device.bytes_per_s / batch, 2 * weights / device.flops_per_s)
    token_s = shared_s + (audio_bytes + text_bytes) / device.bytes_per_s
    return encoder_flops(shape) / device.flops_per_s + n_tokens * token_s
