"""A decode step's attention on the GPU, one kernel: rotation, writing of new keys, each row against its own pages.

A row's tokens are split among programs, since one head alone keeps no GPU busy; the last of them to end puts the splits
together. Shapes: B rows, H query heads, Hkv key/value heads, d head size, P pages of a row's table, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.triton_launch import after_others, chained

_TOKENS = 64  # of a tile
_SPLITS = 8


@dataclass(frozen=True, slots=True)
class Splits:
    """Scratch: parts fp32 [B H, S, d + 2], a split's mixture of values, its highest score and its sum of weights;
    arrived int32 [B H]: how many splits of a head have ended, zero between steps."""

    parts: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def make(cls, rows: int, heads: int, size: int, device: torch.device) -> Splits:
        """For up to so many rows."""
        parts = torch.empty(rows * heads, splits(device), size + 2, device=device)
        return cls(parts, torch.zeros(rows * heads, dtype=torch.int32, device=device))


def splits(device: torch.device) -> int:
    """S: few where they are interpreted one after the other."""
    return _SPLITS if device.type == "cuda" else 2


@triton.jit
def _rotated(source, position, cos, sin, place, inside, half):  # type: ignore[no-untyped-def]
    """Both halves of a head at its position."""
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + place, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + position * half + place, mask=inside, other=0.0)
    s = tl.load(sin + position * half + place, mask=inside, other=0.0)
    return first * c - second * s, second * c + first * s


@triton.jit  # type: ignore[untyped-decorator]
def _tokens(keys, values, table, start, position, page, kv_heads, own, size, place, inside, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys and values of tokens before `position`, each in two halves [T, d / 2]."""
    token = start + tl.arange(0, T)
    there = token < position
    block = tl.load(table + token // page, mask=there, other=0).to(tl.int64)
    at = (((block * page + token % page) * kv_heads + own) * size)[:, None] + place[None, :]
    both, half = there[:, None] & inside[None, :], size // 2
    key1 = tl.load(keys + at, mask=both, other=0.0)
    key2 = tl.load(keys + at + half, mask=both, other=0.0)
    value1 = tl.load(values + at, mask=both, other=0.0)
    value2 = tl.load(values + at + half, mask=both, other=0.0)
    return key1, key2, value1, value2


@triton.jit  # type: ignore[untyped-decorator]
def _mixed(tile, start, position, query1, query2, highest, weights, mixed1, mixed2, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is mixed so far, and a tile of tokens with it."""
    key1, key2, value1, value2 = tile
    there = start + tl.arange(0, T) < position
    score = tl.sum(key1.to(tl.float32) * query1[None, :] + key2.to(tl.float32) * query2[None, :], 1)
    score = tl.where(there, score, -float("inf"))
    new = tl.maximum(highest, tl.max(score, 0))
    weight, old = tl.exp(score - new), tl.exp(highest - new)
    mixed1 = mixed1 * old + tl.sum(weight[:, None] * value1.to(tl.float32), 0)
    mixed2 = mixed2 * old + tl.sum(weight[:, None] * value2.to(tl.float32), 0)
    return new, weights * old + tl.sum(weight, 0), mixed1, mixed2


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    qkv, cos, sin, positions, slots, keys, values, tables, parts, arrived, out, num_pages, page, heads, kv_heads, size,
    scale, S: tl.constexpr, T: tl.constexpr, HALF: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One split of one head of one row: its tiles of tokens, the row's own token with the first ones (online softmax,
    arXiv 1805.02867). What is in the cache is under way before the row's query is there."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half, group = size // 2, heads // kv_heads
    own = head // group
    place, lane = tl.arange(0, HALF), tl.arange(0, S)
    inside = place < half
    of_row = qkv + row * (heads + 2 * kv_heads) * size
    position = tl.load(positions + row)
    start, of_table = split * T + position * 0, tables + row * num_pages
    tile = _tokens(keys, values, of_table, start, position, page, kv_heads, own, size, place, inside, T)
    after_others(CHAINED)
    query1, query2 = _rotated(of_row + head * size, position, cos, sin, place, inside, half)
    query1, query2 = query1 * scale, query2 * scale
    highest, weights = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.float32)
    mixed1, mixed2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    if split == 0:
        kind = keys.dtype.element_ty
        key1, key2 = _rotated(of_row + (heads + own) * size, position, cos, sin, place, inside, half)
        key1, key2 = key1.to(kind), key2.to(kind)
        value = of_row + (heads + kv_heads + own) * size + place
        value1 = tl.load(value, mask=inside, other=0.0).to(kind)
        value2 = tl.load(value + half, mask=inside, other=0.0).to(kind)
        slot = tl.load(slots + row)
        if (slot >= 0) & (head % group == 0):
            at = (slot * kv_heads + own) * size + place
            tl.store(keys + at, key1, mask=inside)
            tl.store(keys + at + half, key2, mask=inside)
            tl.store(values + at, value1, mask=inside)
            tl.store(values + at + half, value2, mask=inside)
        highest = tl.sum(query1 * key1.to(tl.float32) + query2 * key2.to(tl.float32), 0)
        weights += 1.0
        mixed1, mixed2 = value1.to(tl.float32), value2.to(tl.float32)
    if start < position:
        highest, weights, mixed1, mixed2 = _mixed(
            tile, start, position, query1, query2, highest, weights, mixed1, mixed2, T
        )
    start += S * T
    while start < position:
        tile = _tokens(keys, values, of_table, start, position, page, kv_heads, own, size, place, inside, T)
        highest, weights, mixed1, mixed2 = _mixed(
            tile, start, position, query1, query2, highest, weights, mixed1, mixed2, T
        )
        start += S * T
    of_head, wide = row * heads + head, size + 2
    part = parts + (of_head * S + split) * wide
    tl.store(part + place, mixed1, mask=inside)
    tl.store(part + half + place, mixed2, mask=inside)
    tl.store(part + size, highest)
    tl.store(part + size + 1, weights)
    tl.debug_barrier()
    if tl.atomic_add(arrived + of_head, 1) == S - 1:
        each = parts + (of_head * S + lane) * wide
        tops = tl.load(each + size, cache_modifier=".cg")
        share = tl.exp(tops - tl.max(tops, 0))
        whole = tl.sum(share * tl.load(each + size + 1, cache_modifier=".cg"), 0)
        at = each[:, None] + place[None, :]
        mixed1 = tl.sum(share[:, None] * tl.load(at, mask=inside[None, :], other=0.0, cache_modifier=".cg"), 0)
        mixed2 = tl.sum(share[:, None] * tl.load(at + half, mask=inside[None, :], other=0.0, cache_modifier=".cg"), 0)
        tl.store(out + of_head * size + place, mixed1 / whole, mask=inside)
        tl.store(out + of_head * size + half + place, mixed2 / whole, mask=inside)
        tl.store(arrived + of_head, 0)


def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    scratch: Splits,
    out: torch.Tensor,
    scale: float,
) -> None:
    """out fp32 [B, H, d]: each row's softmax(q k scale) v over its tokens up to its own, which is stored.

    qkv fp32 [B, H + 2 Hkv, d], before rotation; cos, sin fp32 [positions, d/2]; positions int64 [B]; keys, values
    [blocks, page, Hkv, d]; slots int64 [B]: where a row's key and value go, negative for nowhere; tables int64 [B, P]:
    the blocks of a row, in order.
    """
    rows, heads, size = out.shape
    page, kv_heads = keys.shape[1], keys.shape[2]
    num = splits(out.device)
    _attend[(rows, heads, num)](
        qkv, cos, sin, positions, slots, keys, values, tables, scratch.parts, scratch.arrived, out, tables.shape[1],
        page, heads, kv_heads, size, scale, S=num, T=_TOKENS, HALF=triton.next_power_of_2(size // 2),
        **chained(out, early=rows == 1),
    )  # fmt: skip
