"""Attention of a few new positions to what lies in slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

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
