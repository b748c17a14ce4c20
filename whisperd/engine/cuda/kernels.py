"""Triton kernels of the decoder: attention to slots, and writes into them.

Both skip what does not count: no position behind a row's live length is read, and a row with the live length 0 (one
that pads a step, or is done) costs nothing. Checked against ``caches.gathered`` and ``caches.put`` in Triton's
interpreter, and compiled for the GPUs of ``benchmarks/gpu/compiled.py``: THEY HAVE NEVER RUN ON A GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whisperd.engine.cuda.caches import Scales

BLOCK = 32  # positions that a program loads at once for one new position
CHUNK_BLOCKS = {2: 64, 4: 32}  # the same for several new positions, by the bytes of a number: more would not fit
CHUNK_QUERIES = 16  # new positions of one program: the least that the matrix units multiply
PUT_BLOCK = 32  # positions that a program copies
PARTS = (
    (8, 4),
    (16, 2),
)  # up to so many rows, so many programs share a row and head; more rows fill a GPU
TINY = 1e-30  # instead of a weight of 0: a row that sees nothing becomes 0


def parts(n_rows: int) -> int:
    """How many programs share the positions of one row and head."""
    return next((count for rows, count in PARTS if n_rows <= rows), 1)


@triton.jit
def attend_one(
    query,
    keys,
    values,
    slots,
    live,
    key_scales,
    value_scales,
    result,
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
    WHOLE: tl.constexpr,
):
    """One new position of one row, one head, one part of the positions.

    Each lane (position modulo BLOCK) keeps a softmax of its own, so that the loop needs no reduction across threads
    and no barrier; the lanes are joined behind it. ``WHOLE``: this is the only part, and the result is written.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, lane = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    slot = tl.load(slots + row)
    first = part * part_length
    end = tl.minimum(first + part_length, tl.load(live + row)).to(tl.int32)
    wanted = tl.load(query + row * query_row_stride + head * query_head_stride + column).to(tl.float32) * scale
    if SCALED:
        wanted *= tl.load(key_scales + slot * n_heads + head)
    place = slot * slot_stride + head * head_stride + lane[:, None] * position_stride + column[None]
    largest = tl.full([BLOCK], -1e30, tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(first, end, BLOCK):
        there = start + lane < end
        # both are requested before either is needed
        key = tl.load(keys + place + start * position_stride, mask=there[:, None], other=0.0)
        value = tl.load(values + place + start * position_stride, mask=there[:, None], other=0.0)
        score = tl.where(there, tl.sum(key.to(tl.float32) * wanted[None], 1), -1e30)
        larger = tl.maximum(largest, score)
        kept = tl.exp(largest - larger)
        share = tl.where(there, tl.exp(score - larger), 0.0)
        found = found * kept[:, None] + share[:, None] * value.to(tl.float32)
        weight = weight * kept + share
        largest = larger
    most = tl.max(largest, 0)
    factor = tl.exp(largest - most)
    total = tl.sum(found * factor[:, None], 0)
    total_weight = tl.sum(weight * factor, 0)
    if SCALED:
        total *= tl.load(value_scales + slot * n_heads + head)
    out = (row * n_heads + head) * tl.num_programs(2) + part
    if WHOLE:
        total = total / tl.maximum(total_weight, 1e-30)
        tl.store(result + out * WIDTH + column, total.to(result.dtype.element_ty))
    else:
        tl.store(maxima + out, most)
        tl.store(weights + out, total_weight)
        tl.store(sums + out * WIDTH + column, total)


@triton.jit
def attend_several(
    query,
    keys,
    values,
    slots,
    live,
    key_scales,
    value_scales,
    result,
    n_heads,
    n_new,
    bound,
    query_row_stride,
    query_head_stride,
    query_new_stride,
    slot_stride,
    head_stride,
    position_stride,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """QUERIES new positions of one row and one head, which read keys and values once together."""
    row, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, lane = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    new = tile * QUERIES + tl.arange(0, QUERIES)
    slot = tl.load(slots + row)
    sees = tl.minimum(tl.load(live + row) + new, bound).to(tl.int32)
    end = tl.max(tl.where(new < n_new, sees, 0), 0)
    query_at = row * query_row_stride + head * query_head_stride + new[:, None] * query_new_stride + column[None]
    wanted = tl.load(query + query_at, mask=(new < n_new)[:, None], other=0.0)
    if SCALED:
        scale *= tl.load(key_scales + slot * n_heads + head)
    place = slot * slot_stride + head * head_stride + lane[:, None] * position_stride + column[None]
    largest = tl.full([QUERIES], -1e30, tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, end, BLOCK):
        there = start + lane < end
        key = tl.load(keys + place + start * position_stride, mask=there[:, None], other=0.0).to(wanted.dtype)
        value = tl.load(values + place + start * position_stride, mask=there[:, None], other=0.0).to(wanted.dtype)
        visible = (start + lane)[None] < sees[:, None]
        score = tl.dot(wanted, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(visible, score, -1e30)
        larger = tl.maximum(largest, tl.max(score, 1))
        kept = tl.exp(largest - larger)
        share = tl.where(visible, tl.exp(score - larger[:, None]), 0.0)
        found = found * kept[:, None] + tl.dot(share.to(wanted.dtype), value, input_precision="ieee")
        weight = weight * kept + tl.sum(share, 1)
        largest = larger
    if SCALED:
        found *= tl.load(value_scales + slot * n_heads + head)
    found = found / tl.maximum(weight, 1e-30)[:, None]
    # [rows, new, heads, head width], as the next layer reads it
    out = ((row * n_new + new[:, None]) * n_heads + head) * WIDTH + column[None]
    tl.store(result + out, found.to(result.dtype.element_ty), mask=(new < n_new)[:, None])


@triton.jit
def put_states(
    cache_keys,
    cache_values,
    keys,
    values,
    slots,
    first,
    n_new,
    row_stride,
    head_stride,
    new_stride,
    slot_stride,
    cache_head_stride,
    position_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies keys and values of BLOCK new positions of one row and one head into its slot."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None]
    new = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[:, None]
    there = new < n_new
    source = row * row_stride + head * head_stride + new * new_stride + column
    position = tl.load(first + row) + new
    target = tl.load(slots + row) * slot_stride + head * cache_head_stride + position * position_stride + column
    key = tl.load(keys + source, mask=there)
    value = tl.load(values + source, mask=there)
    tl.store(cache_keys + target, key, mask=there)
    tl.store(cache_values + target, value, mask=there)


class SlotKernels:
    """``caches.SlotOperations`` as Triton kernels."""

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
        """See ``caches.SlotOperations``."""
        if query.shape[2] == 1:
            return _attend_one(query, keys, values, slots, live, bound, scales)
        n_rows, n_heads, n_new, width = query.shape
        result = query.new_empty((n_rows, n_new, n_heads, width))
        attend_several[n_rows, n_heads, triton.cdiv(n_new, CHUNK_QUERIES)](
            query,
            keys,
            values,
            slots,
            live,
            scales.keys if scales else slots,
            scales.values if scales else slots,
            result,
            n_heads,
            n_new,
            bound,
            *query.stride()[:3],
            *keys.stride()[:3],
            width**-0.5,
            WIDTH=width,
            BLOCK=CHUNK_BLOCKS[query.element_size()],
            QUERIES=CHUNK_QUERIES,
            SCALED=scales is not None,
        )
        return result.transpose(1, 2)

    def put(
        self, cache_keys: Tensor, cache_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, first: Tensor
    ) -> None:
        """See ``caches.SlotOperations``."""
        n_rows, n_heads, n_new, width = keys.shape
        block = min(PUT_BLOCK, triton.next_power_of_2(n_new))
        put_states[n_rows, n_heads, triton.cdiv(n_new, block)](
            cache_keys,
            cache_values,
            keys,
            values,
            slots,
            first,
            n_new,
            *keys.stride()[:3],
            *cache_keys.stride()[:3],
            WIDTH=width,
            BLOCK=block,
        )


def _attend_one(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, live: Tensor, bound: int, scales: Scales | None
) -> Tensor:
    n_rows, n_heads, _, width = query.shape
    n_parts = parts(n_rows)
    result = query.new_empty((n_rows, n_heads, 1, width))
    sums = maxima = weights = result
    if n_parts > 1:
        sums = torch.empty((n_rows, n_heads, n_parts, width), dtype=torch.float32, device=query.device)
        maxima = torch.empty((n_rows, n_heads, n_parts), dtype=torch.float32, device=query.device)
        weights = torch.empty_like(maxima)
    attend_one[n_rows, n_heads, n_parts](
        query,
        keys,
        values,
        slots,
        live,
        scales.keys if scales else slots,
        scales.values if scales else slots,
        result,
        sums,
        maxima,
        weights,
        n_heads,
        triton.cdiv(bound, n_parts * BLOCK) * BLOCK,
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        width**-0.5,
        WIDTH=width,
        BLOCK=BLOCK,
        SCALED=scales is not None,
        WHOLE=n_parts == 1,
    )
    if n_parts == 1:
        return result
    share = torch.exp(maxima - maxima.amax(dim=2, keepdim=True))
    total = (weights * share).sum(dim=2).clamp(min=TINY)
    joined = (sums * share[..., None]).sum(dim=2) / total[..., None]
    return joined[:, :, None].to(query.dtype)
