"""Keys and values of the decoder in slots on the device, and attention to them.

Audio in 8 bits is tested on the CPU; it HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.engine.checkpoints import Shape

SMALLEST_SCALE = 1e-12  # of keys that are all 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Keys and values of the decoder.

    ``cross_*`` [layers, windows, heads, frames, head width]: the audio of a window, written once.
    ``self_*`` [layers, rows, heads, positions, head width]: the text of a row, one position with each token.
    ``scales``: for each layer, where the audio is kept in 8 bits, what its numbers are multiplied with.
    """

    cross_keys: Tensor
    cross_values: Tensor
    self_keys: Tensor
    self_values: Tensor
    scales: tuple[Scales, ...] = ()

    @classmethod
    def allocate(
        cls,
        shape: Shape,
        n_windows: int,
        n_rows: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        fp8_cross: bool = False,
    ) -> Caches:
        """Zeros: what no row has written is masked, but a NaN there would still spread."""
        heads, width = shape.decoder_heads, shape.width // shape.decoder_heads

        def zeros(n_slots: int, length: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((shape.decoder_layers, n_slots, heads, length, width), device=device, dtype=dtype)

        def ones() -> Tensor:
            return torch.ones((n_windows, heads), device=device)

        audio = FP8 if fp8_cross else dtype
        return cls(
            cross_keys=zeros(n_windows, shape.frames, audio),
            cross_values=zeros(n_windows, shape.frames, audio),
            self_keys=zeros(n_rows, shape.positions),
            self_values=zeros(n_rows, shape.positions),
            scales=tuple(Scales(keys=ones(), values=ones()) for _ in range(shape.decoder_layers if fp8_cross else 0)),
        )

    def scales_of(self, layer: int) -> Scales | None:
        """What the audio of a layer is multiplied with; None where it is kept as it is."""
        return self.scales[layer] if self.scales else None

    def put_audio(self, layer: int, windows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes [n, heads, frames, head width] into windows (int64 [n])."""
        scales = self.scales_of(layer)
        if scales is None:
            self.cross_keys[layer, windows], self.cross_values[layer, windows] = keys, values
            return
        _put_small(self.cross_keys[layer], scales.keys, windows, keys)
        _put_small(self.cross_values[layer], scales.values, windows, values)

    def copy_text(self, source: Tensor, rows: Tensor, bound: int) -> None:
        """Rows (int64 [n]) remember what others (int64 [n]) do, up to a position."""
        for cache in (self.self_keys, self.self_values):
            cache[:, rows, :, :bound] = cache[:, source, :, :bound]

    def audio_keys(self, layer: int, head: int, windows: Tensor) -> Tensor:
        """float32 [n, frames, head width]."""
        scales = self.scales_of(layer)
        found = in_full(self.cross_keys[layer, :, head, None], windows, scales and scales.keys[:, head, None])
        return found[:, 0].float()


def _put_small(cache: Tensor, scales: Tensor, windows: Tensor, states: Tensor) -> None:
    """The largest number of each window and head becomes the largest that 8 bits hold."""
    scale = (states.float().abs().amax(dim=(2, 3)) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    small = (states.float() / scale[..., None, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    scales[windows] = scale
    cache.view(torch.uint8)[windows] = small.view(torch.uint8)


FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """float32 [slots, heads]: what keys and values that are kept in 8 bits are multiplied with."""

    keys: Tensor
    values: Tensor


class SlotAttention(Protocol):
    """How queries meet the keys and values of their slots."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        live: Tensor,
        bound: int,
        scales: Scales | None = None,
    ) -> Tensor:
        """Attends each row to its slot.

        Args:
            query: [rows, heads, new, head width]; ``new`` positions that follow each other.
            keys: [slots, heads, positions, head width], as ``values``.
            slots: int64 [rows].
            live: int64 [rows]; how many positions the first of the new ones sees; each further one sees one more.
            bound: no row sees more positions than this.
            scales: of keys and values in 8 bits.
        """
        ...


def gathered(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    live: Tensor,
    bound: int,
    scales: Scales | None = None,
) -> Tensor:
    """Copies the slots together first: right on every device, and no faster than their copy."""
    new = torch.arange(query.shape[2], device=query.device)
    at = torch.arange(bound, device=query.device)
    visible = at < (live[:, None] + new)[:, None, :, None]
    found_keys = in_full(keys[:, :, :bound], slots, scales and scales.keys)
    found_values = in_full(values[:, :, :bound], slots, scales and scales.values)
    return functional.scaled_dot_product_attention(
        query, found_keys.to(query.dtype), found_values.to(query.dtype), attn_mask=visible
    )


def in_full(cache: Tensor, slots: Tensor, scales: Tensor | None) -> Tensor:
    """What lies in slots, [rows, heads, positions, head width], float32 where it was kept in 8 bits."""
    if scales is None:
        return cache[slots]
    # not every device moves numbers of 8 bits about, but bytes they all do
    small = cache.view(torch.uint8)[slots].view(FP8)
    return small.float() * scales[slots][..., None, None]
