"""One FFN layer's sparse decode on a GPU: ids of a mask, factors of the taken neurons, and what they add to each row.

A record is read where it lies: in a slot of GPU memory, or in its home in registered main memory, by its address. No
host work and no synchronisation, so that a CUDA graph can hold it; sums are made in one order, whatever is resident.
Knows addresses and strides, not layers and not who is resident why.
Shapes: B rows, F neurons, D hidden, K taken neurons, P programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 1024  # neurons of a program of `take`
COUNTERS = ("lookups", "hits", "missed_first", "missed_down", "hit_down")


@triton.jit  # type: ignore[untyped-decorator]
def _take(mask, slots, score, ids, count, counters, num, rows, decay, BLOCK: tl.constexpr, PAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program writes the ids of its block behind those of the blocks before, which it counts itself."""
    first = tl.program_id(0) * BLOCK
    before = 0
    for at in range(0, first, PAST):
        place = at + tl.arange(0, PAST)
        any_row = tl.zeros([PAST], tl.int32)
        for row in range(0, rows):
            any_row |= tl.load(mask + row * num + place, mask=place < first, other=0).to(tl.int32)
        before += tl.sum(any_row)
    place = first + tl.arange(0, BLOCK)
    inside = place < num
    taken = tl.zeros([BLOCK], tl.int32)
    for row in range(0, rows):
        taken |= tl.load(mask + row * num + place, mask=inside, other=0).to(tl.int32)
    at = before + tl.cumsum(taken, 0) - taken
    tl.store(ids + at, place, mask=taken > 0)
    old = tl.load(score + place, mask=inside, other=0.0)
    tl.store(score + place, old * decay + taken.to(tl.float32), mask=inside)
    resident = (tl.load(slots + place, mask=inside, other=-1) >= 0) & (taken > 0)
    tl.atomic_add(counters, tl.sum(taken).to(tl.int64))
    tl.atomic_add(counters + 1, tl.sum(resident.to(tl.int32)).to(tl.int64))
    if first + BLOCK >= num:
        tl.store(count, before + tl.sum(taken))


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    x, ids, count, slots, slab, home, mask, h, counters, num, stride, hidden, most,
    GATED: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """h[row, k] = act(up . x), or act(gate . x) * (up . x), of the k-th taken neuron; 0 where the row takes it not."""
    column = tl.arange(0, D)
    valid = column < hidden
    row = tl.arange(0, ROWS)
    total, missed = tl.load(count), tl.full([], 0, tl.int64)
    for k in range(tl.program_id(0), total, tl.num_programs(0)):
        neuron = tl.load(ids + k)
        slot = tl.load(slots + neuron)
        resident = slot >= 0
        place = tl.where(resident, slab + slot.to(tl.int64) * stride, home + neuron.to(tl.int64) * stride)
        missed += tl.where(resident, 0, 1)
        record = tl.multiple_of(place.to(tl.pointer_type(TYPE)), ALIGN)
        xs = tl.load(x + row[:, None] * hidden + column[None, :], mask=valid[None, :], other=0.0)
        first = tl.load(record + column, mask=valid, other=0.0).to(tl.float32)
        value = tl.maximum(tl.sum(xs * first[None, :], 1), 0.0)
        if SQUARED:
            value = value * value
        if GATED:
            up = tl.load(record + hidden + column, mask=valid, other=0.0).to(tl.float32)
            value = value * tl.sum(xs * up[None, :], 1)
        takes = tl.load(mask + row * num + neuron)
        tl.store(h + row * most + k, tl.where(takes != 0, value, 0.0))
    tl.atomic_add(counters + 2, missed)


@triton.jit  # type: ignore[untyped-decorator]
def _down(  # type: ignore[no-untyped-def]
    h, ids, count, slots, slab, home, partial, counters, stride, hidden, most, down_offset,
    ROWS: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """partial[program, row, tile of D] = sum over the program's share of the taken neurons whose factor is not zero."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid = column < hidden
    row = tl.arange(0, ROWS)
    total = tl.load(count)
    missed, hits = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    out = tl.zeros([ROWS, TILE], tl.float32)
    for k in range(program, total, programs):
        factor = tl.load(h + row * most + k)
        if tl.max(tl.abs(factor)) > 0.0:
            neuron = tl.load(ids + k)
            slot = tl.load(slots + neuron)
            resident = slot >= 0
            place = tl.where(resident, slab + slot.to(tl.int64) * stride, home + neuron.to(tl.int64) * stride)
            missed += tl.where(resident, 0, 1)
            hits += tl.where(resident, 1, 0)
            record = tl.multiple_of((place + down_offset).to(tl.pointer_type(TYPE)), ALIGN)
            vector = tl.load(record + column, mask=valid, other=0.0).to(tl.float32)
            out += factor[:, None] * vector[None, :]
    tl.store(partial + (program * ROWS + row[:, None]) * hidden + column[None, :], out, mask=valid[None, :])
    if tl.program_id(1) == 0:
        tl.atomic_add(counters + 3, missed)
        tl.atomic_add(counters + 4, hits)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(partial, residual, out, size, programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = residual + the sum of all partials, in order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < size
    total = tl.load(residual + place, mask=valid, other=0.0)
    for program in range(0, programs):
        total += tl.load(partial + program * size + place, mask=valid, other=0.0)
    tl.store(out + place, total, mask=valid)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_records(homes, layers, neurons, target, slots, words, BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Record neurons[i] of the home of layers[i] into slot slots[i], as 8-byte words."""
    i = tl.program_id(0)
    home = tl.load(homes + tl.load(layers + i)).to(tl.pointer_type(tl.int64))
    source = tl.multiple_of(home + tl.load(neurons + i).to(tl.int64) * words, ALIGN)
    there = tl.multiple_of(target + tl.load(slots + i).to(tl.int64) * words, ALIGN)
    for at in range(0, words, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(there + place, tl.load(source + place, mask=place < words), mask=place < words)


@dataclass(frozen=True, slots=True)
class SparseScratch:
    """Buffers that all layers share. ids int32 [F], count int32 [1], h fp32 [B, F], partial fp32 [P, B, D]."""

    ids: torch.Tensor
    count: torch.Tensor
    h: torch.Tensor
    partial: torch.Tensor

    @classmethod
    def make(cls, rows: int, num_neurons: int, hidden: int, programs: int, device: str) -> SparseScratch:
        return cls(
            torch.zeros(num_neurons, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(rows, num_neurons, device=device),
            torch.zeros(programs, rows, hidden, device=device),
        )


@dataclass(frozen=True, slots=True)
class LayerRecords:
    """Where a layer's records are. home uint8 [F, stride] in registered main memory; slab uint8 [S, stride] of all
    layers on the GPU; slots int32 [F]: place in the slab, or -1; score fp32 [F]: decayed count of uses; counters int64
    [5], see COUNTERS, of records: lookups, hits, and vectors read of either memory."""

    home: torch.Tensor
    slab: torch.Tensor
    slots: torch.Tensor
    score: torch.Tensor
    counters: torch.Tensor


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def sparse_ffn(
    x: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor,
    records: LayerRecords,
    scratch: SparseScratch,
    gated: bool,
    squared: bool,
    dtype: torch.dtype,
    decay: float = 0.98,
    factor_programs: int = 1056,
) -> None:
    """out = residual + FFN(x) over each row's own set; x, residual, out fp32 [B, D], mask bool or uint8 [B, F].

    ReLU or, squared, ReLU²; with a gate times up. dtype: of the vectors in the records.
    """
    rows, hidden = x.shape
    num, stride = records.home.shape
    bytes_mask = mask.view(torch.uint8)
    home, slab = records.home.data_ptr(), records.slab.data_ptr()
    c, align = records.counters, math.gcd(stride, hidden * dtype.itemsize, 16)
    _take[(-(-num // BLOCK),)](
        bytes_mask,
        records.slots,
        records.score,
        scratch.ids,
        scratch.count,
        c,
        num,
        rows,
        decay,
        BLOCK=BLOCK,
        PAST=4096,
    )
    _factors[(factor_programs,)](
        x, scratch.ids, scratch.count, records.slots, slab, home, bytes_mask, scratch.h, c, num, stride, hidden, num,
        GATED=gated, SQUARED=squared, ROWS=rows, D=triton.next_power_of_2(hidden), TYPE=_TYPES[dtype], ALIGN=align,
    )  # fmt: skip
    tile = min(1024 if rows <= 4 else 512, triton.next_power_of_2(hidden))  # 16 bytes a thread; sums fit registers
    programs = scratch.partial.shape[0]
    _down[(programs, -(-hidden // tile))](
        scratch.h, scratch.ids, scratch.count, records.slots, slab, home, scratch.partial, c, stride, hidden, num,
        (2 if gated else 1) * hidden * dtype.itemsize, ROWS=rows, TILE=tile, TYPE=_TYPES[dtype], ALIGN=align,
    )  # fmt: skip
    size = rows * hidden
    _reduce[(-(-size // 256),)](scratch.partial, residual, out, size, programs, BLOCK=256)


def copy_records(
    homes: torch.Tensor, layers: torch.Tensor, neurons: torch.Tensor, slab: torch.Tensor, slots: torch.Tensor
) -> None:
    """Copies records `neurons` of `layers` (int64 [K] both), read at the homes' addresses int64 [L], into `slots`
    int32 [K] of the slab uint8 [S, stride], whose stride is theirs."""
    if neurons.numel():
        words, align = slab.view(torch.int64), math.gcd(slab.shape[1], 16)
        _copy_records[(neurons.numel(),)](homes, layers, neurons, words, slots, words.shape[1], BLOCK=1024, ALIGN=align)
