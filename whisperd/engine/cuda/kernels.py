"""Decode attention over slots as one Triton kernel: no copy of keys and values, and no work behind a row's live length.

Checked against ``gathered`` in Triton's interpreter on the CPU only: IT HAS NEVER RUN ON A GPU.

Each program takes one row, one head and one part of the positions; a few small operations join the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whisperd.engine.cuda.caches import Scales, gathered

BLOCK = 64  # positions that a program loads at once
PARTS = 4  # programs for each row and head, so that few rows fill a device too


@triton.jit
def _attend_part(
    query,
    keys,
    values,
    slots,
    live,
    key_scales,
    value_scales,
    sums,
    maxima,
    weights,
    n_heads,
    part_length,
    query_row_stride,
    query_head_stride,
    slot_stride,
    head_stride,
    position_stride,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, WIDTH)
    wanted = tl.load(query + row * query_row_stride + head * query_head_stride + column).to(tl.float32) * scale
    slot = tl.load(slots + row)
    if SCALED:
        wanted *= tl.load(key_scales + slot * n_heads + head)
    base = slot * slot_stride + head * head_stride
    end = tl.minimum((part + 1) * part_length, tl.load(live + row))
    largest = tl.full([1], -1e30, tl.float32)
    weight = tl.zeros([1], tl.float32)
    found = tl.zeros([WIDTH], tl.float32)
    for start in range(part * part_length, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        there = position < end
        place = base + position[:, None] * position_stride + column[None]
        key = tl.load(keys + place, mask=there[:, None], other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(key * wanted[None], 1), -1e30)
        larger = tl.maximum(largest, tl.max(score, 0))
        share = tl.exp(score - larger)
        value = tl.load(values + place, mask=there[:, None], other=0.0).to(tl.float32)
        kept = tl.exp(largest - larger)
        found = found * kept + tl.sum(share[:, None] * value, 0)
        weight = weight * kept + tl.sum(share, 0)
        largest = larger
    if SCALED:
        found *= tl.load(value_scales + slot * n_heads + head)
    at = (row * n_heads + head) * tl.num_programs(2) + part
    tl.store(maxima + at + tl.arange(0, 1), largest)
    tl.store(weights + at + tl.arange(0, 1), weight)
    tl.store(sums + at * WIDTH + column, found)


def slotted(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    live: Tensor,
    bound: int,
    scales: Scales | None = None,
) -> Tensor:
    """``SlotAttention`` for one new position in each row; several, as in prefixes, are gathered."""
    n_rows, n_heads, new, width = query.shape
    if new != 1:
        return gathered(query, keys, values, slots, live, bound, scales)
    sums = torch.empty((n_rows, n_heads, PARTS, width), dtype=torch.float32, device=query.device)
    maxima = torch.empty((n_rows, n_heads, PARTS), dtype=torch.float32, device=query.device)
    weights = torch.empty_like(maxima)
    part_length = -(-bound // (PARTS * BLOCK)) * BLOCK
    _attend_part[(n_rows, n_heads, PARTS)](
        query,
        keys,
        values,
        slots,
        live,
        scales.keys if scales else maxima,
        scales.values if scales else maxima,
        sums,
        maxima,
        weights,
        n_heads,
        part_length,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        width**-0.5,
        WIDTH=width,
        BLOCK=BLOCK,
        SCALED=scales is not None,
    )
    share = torch.exp(maxima - maxima.amax(dim=2, keepdim=True))
    joined = (sums * share[..., None]).sum(dim=2) / (weights * share).sum(dim=2)[..., None]
    return joined[:, :, None].to(query.dtype)
