"""An FFN's neurons out of two memories: gate and up where a mask says so, then down of those that came to something.

A record is read from its slot when the neuron has one, from its home otherwise: main memory that is mapped for the
GPU, which the kernel reads over the link by itself, a row of a few KB at a time. There is no list of ids: every program
owns neurons that lie next to each other and leaves out, by masked loads that move nothing, those that no row wants. So
no set is too large, and sums are made in an order that depends neither on the set nor on who has a slot.
Shapes: B rows, F neurons, D hidden, S slots, G groups of neurons that are summed apart; records are words of one dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cache.bundle import BundleDtype, BundleLayout

GROUP = 64  # neurons that are summed up by one program
LOOKUPS, HITS, DOWN_MISSES, DOWN_HITS, ACTIVE, PREDICTED, NUM_COUNTERS = *range(6), 8
_TILE = 4096  # numbers of a weight's tile, at most
_WIDEST = 1024  # of a row at once
_ACTS = {"silu": 0, "relu": 1, "relu2": 2}
TORCH_DTYPES = {
    BundleDtype.BF16: torch.bfloat16,
    BundleDtype.FP16: torch.float16,
    BundleDtype.FP32: torch.float32,
    BundleDtype.INT8: torch.int8,
}


@dataclass(frozen=True, slots=True)
class Records:
    """Where a layer's records are. home [F, words] and slots [S, words] of the layout's dtype; table int32 [F]: a
    neuron's slot, or -1."""

    home: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor
    layout: BundleLayout


@triton.jit
def _load(home, slots, home_row, slot_row, hit, miss, place, inside):  # type: ignore[no-untyped-def]
    """fp32 [N, W] of rows that start at home_row or slot_row [N]; zero where neither hit nor miss."""
    here = tl.load(slots + slot_row[:, None] + place[None, :], mask=hit[:, None] & inside[None, :], other=0)
    there = tl.load(home + home_row[:, None] + place[None, :], mask=miss[:, None] & inside[None, :], other=0)
    return here.to(tl.float32) + there.to(tl.float32)


@triton.jit
def _scale(home, slots, home_row, slot_row, hit, miss, at):  # type: ignore[no-untyped-def]
    """The fp32 scales [N] of an int8 vector, put together from their four bytes."""
    bits = tl.zeros_like(home_row).to(tl.int32)
    for i in tl.static_range(4):
        here = tl.load(slots + slot_row + at + i, mask=hit, other=0).to(tl.int32) & 255
        there = tl.load(home + home_row + at + i, mask=miss, other=0).to(tl.int32) & 255
        bits = bits | ((here + there) << (8 * i))
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    x, live, mask, home, slots, table, active_at, h, used, counters, num_neurons, words,
    hidden: tl.constexpr, gate_at: tl.constexpr, up_at: tl.constexpr, gate_scale: tl.constexpr, up_scale: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, W: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """h [B, F] = act(gate x) up x where mask [B, F] is set and the row is live [B], else zero."""
    ids = tl.program_id(0) * N + tl.arange(0, N)
    there = ids < num_neurons
    rows = tl.arange(0, B)
    own = (tl.load(live + rows) != 0)[None, :] & there[:, None]  # [N, B]
    if MASKED:
        own = own & (tl.load(mask + rows[None, :] * num_neurons + ids[:, None], mask=own, other=0) != 0)
    wanted = tl.max(own.to(tl.int32), axis=1) != 0
    slot = tl.load(table + ids, mask=wanted, other=-1)
    hit, miss = wanted & (slot >= 0), wanted & (slot < 0)
    home_row, slot_row = ids.to(tl.int64) * words, slot.to(tl.int64) * words
    gate, up = tl.zeros([N, B], tl.float32), tl.zeros([N, B], tl.float32)
    if tl.max(wanted.to(tl.int32), axis=0) != 0:
        for start in range(0, hidden, W):
            place = start + tl.arange(0, W)
            inside = place < hidden
            xs = tl.load(x + rows[:, None] * hidden + place[None, :], mask=inside[None, :], other=0.0)  # [B, W]
            weight = _load(home, slots, home_row + up_at, slot_row + up_at, hit, miss, place, inside)
            up += tl.sum(weight[:, None, :] * xs[None, :, :], axis=2)
            if GATED:
                weight = _load(home, slots, home_row + gate_at, slot_row + gate_at, hit, miss, place, inside)
                gate += tl.sum(weight[:, None, :] * xs[None, :, :], axis=2)
        if SCALED:
            up *= _scale(home, slots, home_row, slot_row, hit, miss, up_scale)[:, None]
            if GATED:
                gate *= _scale(home, slots, home_row, slot_row, hit, miss, gate_scale)[:, None]
    z = gate if GATED else up
    if ACT == 0:
        z = z / (1 + tl.exp(-z))
    else:
        z = tl.maximum(z, 0.0)
        if ACT == 2:
            z = z * z
    value = tl.where(z == 0, 0.0, z * up) if GATED else z
    value = tl.where(own, value, 0.0)
    tl.store(h + rows[None, :] * num_neurons + ids[:, None], value, mask=there[:, None] & (rows[None, :] < B))
    tl.store(used + ids, tl.load(used + ids, mask=wanted, other=0) + 1, mask=wanted)
    down = wanted & (tl.max((value != 0).to(tl.int32), axis=1) != 0)
    tl.atomic_add(counters + 0, tl.sum(wanted.to(tl.int64), axis=0))
    tl.atomic_add(counters + 1, tl.sum(hit.to(tl.int64), axis=0))
    tl.atomic_add(counters + 2, tl.sum((down & miss).to(tl.int64), axis=0))
    tl.atomic_add(counters + 3, tl.sum((down & hit).to(tl.int64), axis=0))
    if COUNTED:
        least = tl.load(active_at + ids, mask=there, other=0.0)
        active = own & (tl.abs(value) >= least[:, None]) & (value != 0)
        tl.atomic_add(counters + 4, tl.sum(tl.sum(active.to(tl.int64), axis=1), axis=0))
        tl.atomic_add(counters + 5, tl.sum(tl.sum(own.to(tl.int64), axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    h, home, slots, table, partial, num_neurons, words,
    hidden: tl.constexpr, down_at: tl.constexpr, down_scale: tl.constexpr,
    B: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, W: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """partial [G, B, D]: for each group of neurons, the sum of h times down; what h leaves out is not read."""
    group, rows = tl.program_id(0), tl.arange(0, B)
    place = tl.program_id(1) * W + tl.arange(0, W)
    inside = place < hidden
    total = tl.zeros([B, W], tl.float32)
    for start in range(0, GROUP, N):
        ids = group * GROUP + start + tl.arange(0, N)
        there = ids < num_neurons
        value = tl.load(h + rows[:, None] * num_neurons + ids[None, :], mask=there[None, :], other=0.0)  # [B, N]
        wanted = tl.max((value != 0).to(tl.int32), axis=0) != 0
        if tl.max(wanted.to(tl.int32), axis=0) != 0:
            slot = tl.load(table + ids, mask=wanted, other=-1)
            hit, miss = wanted & (slot >= 0), wanted & (slot < 0)
            home_row, slot_row = ids.to(tl.int64) * words, slot.to(tl.int64) * words
            weight = _load(home, slots, home_row + down_at, slot_row + down_at, hit, miss, place, inside)
            if SCALED:
                value = value * _scale(home, slots, home_row, slot_row, hit, miss, down_scale)[None, :]
            total += tl.sum(value[:, :, None] * weight[None, :, :], axis=1)
    out = partial + (group * B + rows[:, None]) * hidden + place[None, :]
    tl.store(out, total, mask=inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(partial, out, size, num_groups: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [B D] += the sum of partial [G, B D] over groups, in their order."""
    place = tl.program_id(0) * W + tl.arange(0, W)
    inside = place < size
    total = tl.load(out + place, mask=inside, other=0.0)
    for group in range(0, num_groups):
        total += tl.load(partial + group * size + place, mask=inside, other=0.0)
    tl.store(out + place, total, mask=inside)


def num_groups(num_neurons: int) -> int:
    """G: first dimension of `partial`."""
    return -(-num_neurons // GROUP)


def add_ffn(
    x: torch.Tensor,
    records: Records,
    act: str,
    mask: torch.Tensor | None,
    active_at: torch.Tensor | None,
    out: torch.Tensor,
    h: torch.Tensor,
    partial: torch.Tensor,
    used: torch.Tensor,
    counters: torch.Tensor,
    live: torch.Tensor,
) -> None:
    """out [B, D] += FFN(x), x fp32 [B, D], over the neurons of mask uint8 [B, F] (None: all), row by row.

    B is a power of two; a row whose `live` int64 [B] is zero is padding and wants nothing. active_at fp32 [F]: what a
    factor must reach to be counted as active; None: nothing was predicted, nothing is counted. Scratch: h fp32 [B, F],
    partial fp32 [G, B, D]. used int32 [F] counts the steps that wanted a neuron, counters int64 [NUM_COUNTERS] neurons.
    ValueError for an activation that is not known.
    """
    if act not in _ACTS:
        raise ValueError(f"unknown activation {act}")
    rows, hidden = x.shape
    num_neurons, words = records.home.shape
    layout, item = records.layout, records.layout.dtype.item_bytes
    vectors = {v.name: v for v in layout.vectors}
    at = {name: v.offset // item for name, v in vectors.items()}
    scale = {name: v.scale_offset for name, v in vectors.items()}
    wide, scaled = _width(hidden), layout.dtype is BundleDtype.INT8
    tile = max(1, _TILE // (wide * rows))
    _factors[(triton.cdiv(num_neurons, tile),)](
        x, live, h if mask is None else mask, records.home, records.slots, records.table,
        h if active_at is None else active_at, h, used, counters, num_neurons, words,
        hidden, at.get("gate", 0), at["up"], scale.get("gate", 0), scale["up"],
        B=rows, N=tile, W=wide, ACT=_ACTS[act], GATED=layout.gated, SCALED=scaled,
        COUNTED=active_at is not None, MASKED=mask is not None,
    )  # fmt: skip
    wide = min(wide, max(128, _TILE // (4 * rows)))
    tile = max(1, min(GROUP, _TILE // (wide * rows)))
    groups = num_groups(num_neurons)
    _combine[(groups, triton.cdiv(hidden, wide))](
        h, records.home, records.slots, records.table, partial, num_neurons, words, hidden, at["down"], scale["down"],
        B=rows, GROUP=GROUP, N=tile, W=wide, SCALED=scaled,
    )  # fmt: skip
    size = rows * hidden
    _reduce[(triton.cdiv(size, 256),)](partial, out, size, groups, W=256)


def _width(hidden: int) -> int:
    return min(_WIDEST, int(triton.next_power_of_2(hidden)))
