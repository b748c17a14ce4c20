"""Attention of a few new positions to what lies in slots."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class SlotAttention(Protocol):
    """How queries meet the keys and values of their slots."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, live: Tensor, bound: int) -> Tensor:
        """Attends each row to its slot.

        Args:
            query: [rows, heads, new, head width]; ``new`` positions that follow each other.
            keys: [slots, heads, positions, head width], as ``values``.
            slots: int64 [rows].
            live: int64 [rows]; how many positions the first of the new ones sees; each further one sees one more.
            bound: no row sees more positions than this.
        """
        ...


def gathered(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, live: Tensor, bound: int) -> Tensor:
    """Copies the slots together first: right on every device, and no faster than their copy."""
    new = torch.arange(query.shape[2], device=query.device)
    at = torch.arange(bound, device=query.device)
    visible = at < (live[:, None] + new)[:, None, :, None]
    return functional.scaled_dot_product_attention(
        query, keys[slots, :, :bound], values[slots, :, :bound], attn_mask=visible
    )
