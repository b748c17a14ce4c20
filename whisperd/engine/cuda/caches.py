"""Keys and values of the decoder in slots on the device, and attention to them.

Audio in 8 bits is tested on the CPU; it HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from whisperd.engine.checkpoints import Shape

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 1e-12  # of keys that are all 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """float32 [slots, heads]: the factors of keys and values in 8 bits."""

    keys: Tensor
    values: Tensor


class SlotOperations(Protocol):
    """Reads and writes keys and values in slots: plain PyTorch here, Triton in ``kernels``."""

    def attend(
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
            live: int64 [rows]; how many positions the first of the new ones sees; each further one sees one more. 0
                of a single new position: the row is skipped and its result is 0.
            bound: no row sees more positions than this.
            scales: of keys and values in 8 bits.

        Returns:
            As ``query``, contiguous or not.
        """
        ...

    def put(
        self, cache_keys: Tensor, cache_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, first: Tensor
    ) -> None:
        """Writes keys and values [n, heads, new, head width] into slots (int64 [n]).

        ``first`` (int64 [n]) are the positions of the first of the new ones; the rest follow. The caches are
        [slots, heads, positions, head width].
        """
        ...


class TorchSlots:
    """``SlotOperations`` in plain PyTorch, for every device."""

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        live: Tensor,
        bound: int,
        scales: Scales | None = None,
    ) -> Tensor:
        """See ``SlotOperations``."""
        return gathered(query, keys, values, slots, live, bound, scales)

    def put(
        self, cache_keys: Tensor, cache_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, first: Tensor
    ) -> None:
        """See ``SlotOperations``."""
        positions = first[:, None] + torch.arange(keys.shape[2], device=keys.device)
        cache_keys[slots[:, None], :, positions] = keys.transpose(1, 2)
        cache_values[slots[:, None], :, positions] = values.transpose(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Keys and values of the decoder, for each layer.

    ``cross_*`` [layers, windows, heads, frames, head width]: the audio of a window, written once.
    ``self_*`` [layers, rows, heads, positions, head width]: the text of a row, one position with each token.
    ``scales``: of audio in 8 bits, one for each layer; else empty.
    ``slots``: the operations on them.
    """

    cross_keys: Tensor
    cross_values: Tensor
    self_keys: Tensor
    self_values: Tensor
    scales: tuple[Scales, ...] = ()
    slots: SlotOperations = field(default_factory=TorchSlots)

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
        slots: SlotOperations | None = None,
    ) -> Caches:
        """Allocates zeros: positions that nothing was written to are masked, but a NaN there would spread."""
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
            slots=slots or TorchSlots(),
        )

    def scales_of(self, layer: int) -> Scales | None:
        """The scales of a layer's audio in 8 bits; None for audio in full."""
        return self.scales[layer] if self.scales else None

    def put_audio(self, layer: int, windows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes [n, heads, frames, head width] into windows (int64 [n])."""
        scales, first = self.scales_of(layer), torch.zeros_like(windows)
        cache_keys, cache_values = self.cross_keys[layer], self.cross_values[layer]
        if scales is None:
            self.slots.put(cache_keys, cache_values, keys, values, windows, first)
            return
        small_keys, small_values = _quantised(scales.keys, windows, keys), _quantised(scales.values, windows, values)
        self.slots.put(
            cache_keys.view(torch.uint8), cache_values.view(torch.uint8), small_keys, small_values, windows, first
        )

    def attend_audio(self, layer: int, query: Tensor, windows: Tensor, live: Tensor) -> Tensor:
        """Attends rows [rows, heads, new, head width] to windows; ``live`` is ``frames``, or 0 for rows to skip."""
        keys, values = self.cross_keys[layer], self.cross_values[layer]
        return self.slots.attend(query, keys, values, windows, live, keys.shape[2], self.scales_of(layer))

    def put_text(self, layer: int, rows: Tensor, first: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes [n, heads, new, head width] into rows (int64 [n]), from the positions ``first`` (int64 [n]) on."""
        self.slots.put(self.self_keys[layer], self.self_values[layer], keys, values, rows, first)

    def attend_text(self, layer: int, query: Tensor, rows: Tensor, live: Tensor, bound: int) -> Tensor:
        """Attends rows to their own text; see ``SlotOperations.attend``."""
        return self.slots.attend(query, self.self_keys[layer], self.self_values[layer], rows, live, bound)

    def copy_text(self, source: Tensor, rows: Tensor, bound: int) -> None:
        """Copies the text of the rows ``source`` (int64 [n]) to ``rows`` (int64 [n]), up to a position."""
        for cache in (self.self_keys, self.self_values):
            cache[:, rows, :, :bound] = cache[:, source, :, :bound]

    def audio_keys(self, layer: int, head: int, windows: Tensor) -> Tensor:
        """float32 [n, frames, head width]."""
        scales = self.scales_of(layer)
        found = in_full(self.cross_keys[layer, :, head, None], windows, scales and scales.keys[:, head, None])
        return found[:, 0].float()


def gathered(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    live: Tensor,
    bound: int,
    scales: Scales | None = None,
) -> Tensor:
    """Copies the slots into one batch first: works on every device, and is no faster than that copy."""
    new = torch.arange(query.shape[2], device=query.device)
    at = torch.arange(bound, device=query.device)
    visible = at < (live[:, None] + new)[:, None, :, None]
    found_keys = in_full(keys[:, :, :bound], slots, scales and scales.keys)
    found_values = in_full(values[:, :, :bound], slots, scales and scales.values)
    found = functional.scaled_dot_product_attention(
        query, found_keys.to(query.dtype), found_values.to(query.dtype), attn_mask=visible
    )
    return found.masked_fill((live <= 0)[:, None, None, None], 0.0)  # of nothing: PyTorch says NaN or 0 by its version


def in_full(cache: Tensor, slots: Tensor, scales: Tensor | None) -> Tensor:
    """The content of slots, [rows, heads, positions, head width]; float32 where it was kept in 8 bits."""
    if scales is None:
        return cache[slots]
    # not every device can index 8-bit floats, but all can index bytes
    small = cache.view(torch.uint8)[slots].view(FP8)
    return small.float() * scales[slots][..., None, None]


def _quantised(scales: Tensor, windows: Tensor, states: Tensor) -> Tensor:
    """The bytes of [n, heads, frames, head width] in 8 bits; writes the scale of each window and head.

    The largest number of each becomes the largest that 8 bits hold.
    """
    scale = (states.float().abs().amax(dim=(2, 3)) / FP8_MAX).clamp(min=SMALLEST_SCALE)
    scales[windows] = scale
    small = (states.float() / scale[..., None, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return small.view(torch.uint8)
