"""A decode step's attention on the GPU: rotation and writing of new keys, then each row against its own pages.

Shapes: B rows, H query heads, Hkv key/value heads, d head size, P pages of a row's table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 32  # of a tile


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(qkv, cos, sin, positions, slots, q, keys, values, heads, kv_heads, size, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """One head of one row: a query is rotated into q, a key into its slot, a value is copied there."""
    row, head = tl.program_id(0), tl.program_id(1)
    half = size // 2
    place = tl.arange(0, HALF)
    inside = place < half
    source = qkv + (row * (heads + 2 * kv_heads) + head) * size
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + place, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + row)
    c = tl.load(cos + position * half + place, mask=inside, other=0.0)
    s = tl.load(sin + position * half + place, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if head < heads:
        target = q + (row * heads + head) * size
        tl.store(target + place, first * c - second * s, mask=inside)
        tl.store(target + half + place, second * c + first * s, mask=inside)
    elif slot >= 0:
        if head < heads + kv_heads:
            target = keys + (slot * kv_heads + head - heads) * size
            tl.store(target + place, (first * c - second * s).to(keys.dtype.element_ty), mask=inside)
            tl.store(target + half + place, (second * c + first * s).to(keys.dtype.element_ty), mask=inside)
        else:
            target = values + (slot * kv_heads + head - heads - kv_heads) * size
            tl.store(target + place, first.to(values.dtype.element_ty), mask=inside)
            tl.store(target + half + place, second.to(values.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, tables, positions, out, num_pages, page, kv_heads, group, size, scale,
    T: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One head of one row, over the pages of its table, in one pass (online softmax, arXiv 1805.02867)."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, SIZE)
    inside = place < size
    at = (row * kv_heads * group + head) * size
    query = tl.load(q + at + place, mask=inside, other=0.0) * scale
    total = tl.load(positions + row) + 1
    highest, weight_sum = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.float32)
    mixed = tl.zeros([SIZE], tl.float32)
    start = total * 0
    while start < total:
        token = start + tl.arange(0, T)
        there = token < total
        block = tl.load(tables + row * num_pages + token // page, mask=there, other=0).to(tl.int64)
        base = ((block * page + token % page) * kv_heads + head // group) * size
        both = there[:, None] & inside[None, :]
        key = tl.load(keys + base[:, None] + place[None, :], mask=both, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(key * query[None, :], axis=1), -float("inf"))
        new = tl.maximum(highest, tl.max(score, axis=0))
        weight, old = tl.exp(score - new), tl.exp(highest - new)
        value = tl.load(values + base[:, None] + place[None, :], mask=both, other=0.0).to(tl.float32)
        mixed = mixed * old + tl.sum(weight[:, None] * value, axis=0)
        weight_sum = weight_sum * old + tl.sum(weight, axis=0)
        highest = new
        start += T
    tl.store(out + at + place, mixed / weight_sum, mask=inside)


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """qkv [B, H + 2 Hkv, d] -> q fp32 [B, H, d] rotated, keys and values [blocks, page, Hkv, d] at slots int64 [B].

    cos, sin fp32 [positions, d/2]; positions int64 [B]. A row whose slot is negative writes nothing.
    """
    rows, heads, size = q.shape
    kv_heads = keys.shape[2]
    _rotate[(rows, heads + 2 * kv_heads)](
        qkv, cos, sin, positions, slots, q, keys, values, heads, kv_heads, size, HALF=triton.next_power_of_2(size // 2)
    )


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """out fp32 [B, H, d]: each row's softmax(q k scale) v over its tokens up to its own position.

    tables int32 [B, P]: the blocks of a row, in order; positions int64 [B].
    """
    rows, heads, size = q.shape
    page, kv_heads = keys.shape[1], keys.shape[2]
    _attend[(rows, heads)](
        q, keys, values, tables, positions, out, tables.shape[1], page, kv_heads, heads // kv_heads, size, scale,
        T=_TOKENS, SIZE=triton.next_power_of_2(size),
    )  # fmt: skip
