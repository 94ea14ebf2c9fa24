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
COUNTERS = ("lookups", "hits", "missed_down", "hit_down")


@triton.jit  # type: ignore[untyped-decorator]
def _take(  # type: ignore[no-untyped-def]
    mask, slots, score, ids, places, count, counters, slab, home, num, stride, decay,
    rows: tl.constexpr, BLOCK: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Each program writes the ids and addresses of its block behind those of the blocks before, which it counts."""
    first = tl.program_id(0) * BLOCK
    before = tl.full([], 0, tl.int32)
    at = first * 0
    while at < first:
        place = at + tl.arange(0, PAST)
        any_row = tl.zeros([PAST], tl.int32)
        for row in range(0, rows):
            any_row |= tl.load(mask + row * num + place, mask=place < first, other=0).to(tl.int32)
        before += tl.sum(any_row)
        at += PAST
    neuron = first + tl.arange(0, BLOCK)
    inside = neuron < num
    taken = tl.zeros([BLOCK], tl.int32)
    for row in range(0, rows):
        taken |= tl.load(mask + row * num + neuron, mask=inside, other=0).to(tl.int32)
    slot = tl.load(slots + neuron, mask=inside, other=-1)
    old = tl.load(score + neuron, mask=inside, other=0.0)
    tl.store(score + neuron, old * decay + taken.to(tl.float32), mask=inside)
    k = before + tl.cumsum(taken, 0) - taken
    wide = tl.where(slot >= 0, slab + slot.to(tl.int64) * stride, home + neuron.to(tl.int64) * stride)
    tl.store(ids + k, neuron, mask=taken > 0)
    tl.store(places + k, wide, mask=taken > 0)
    tl.atomic_add(counters, tl.sum(taken).to(tl.int64))
    tl.atomic_add(counters + 1, tl.sum(taken * (slot >= 0)).to(tl.int64))
    if first + BLOCK >= num:
        tl.store(count, before + tl.sum(taken))


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    x, ids, places, count, mask, h, num, most,
    hidden: tl.constexpr, GATED: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    W: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """h[row, k] = act(up . x), or act(gate . x) * (up . x), of the k-th taken neuron; 0 where the row takes it not."""
    row = tl.arange(0, ROWS)
    total = tl.load(count)
    first = tl.program_id(0) * N
    while first < total:
        k = first + tl.arange(0, N)
        there = k < total
        neuron = tl.load(ids + k, mask=there, other=0)
        place = tl.load(places + k, mask=there, other=0)
        record = tl.multiple_of(place.to(tl.pointer_type(TYPE)), ALIGN)
        one, two = tl.zeros([N, ROWS], tl.float32), tl.zeros([N, ROWS], tl.float32)
        for at in range(0, hidden, W):
            column = at + tl.arange(0, W)
            inside = there[:, None] & (column < hidden)[None, :]
            xs = tl.load(x + row[:, None] * hidden + column[None, :], mask=(column < hidden)[None, :], other=0.0)
            vector = tl.load(record[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            one += tl.sum(vector[:, None, :] * xs[None, :, :], 2)
            if GATED:
                vector = tl.load(record[:, None] + hidden + column[None, :], mask=inside, other=0.0).to(tl.float32)
                two += tl.sum(vector[:, None, :] * xs[None, :, :], 2)
        value = tl.maximum(one, 0.0)
        if SQUARED:
            value = value * value
        if GATED:
            value = value * two
        own = tl.load(mask + row[None, :] * num + neuron[:, None], mask=there[:, None], other=0)
        tl.store(h + row[None, :] * most + k[:, None], tl.where(own != 0, value, 0.0), mask=there[:, None])
        first += tl.num_programs(0) * N


@triton.jit  # type: ignore[untyped-decorator]
def _down(  # type: ignore[no-untyped-def]
    h, places, count, partial, counters, slab, slab_end, most, down_offset,
    hidden: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """partial[program, row, tile of D] = sum over the program's share of the taken neurons whose factor is not zero."""
    program = tl.program_id(0)
    column = tl.program_id(1) * W + tl.arange(0, W)
    row = tl.arange(0, ROWS)
    total = tl.load(count)
    missed, hits = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    out = tl.zeros([ROWS, W], tl.float32)
    first = program * N
    while first < total:
        k = first + tl.arange(0, N)
        factor = tl.load(h + row[:, None] * most + k[None, :], mask=(k < total)[None, :], other=0.0)  # [ROWS, N]
        wanted = tl.max((factor != 0).to(tl.int32), 0) != 0
        place = tl.load(places + k, mask=wanted, other=0)
        resident = wanted & (place >= slab) & (place < slab_end)
        hits += tl.sum(resident.to(tl.int64))
        missed += tl.sum((wanted & ~resident).to(tl.int64))
        record = tl.multiple_of((place + down_offset).to(tl.pointer_type(TYPE)), ALIGN)
        inside = wanted[:, None] & (column < hidden)[None, :]
        vector = tl.load(record[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)  # [N, W]
        out += tl.sum(factor[:, :, None] * vector[None, :, :], 1)
        first += tl.num_programs(0) * N
    tl.store(partial + (program * ROWS + row[:, None]) * hidden + column[None, :], out, mask=(column < hidden)[None, :])
    if tl.program_id(1) == 0:
        tl.atomic_add(counters + 2, missed)
        tl.atomic_add(counters + 3, hits)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(partial, residual, out, size, programs: tl.constexpr, N: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = residual + the sum of all partials, in one order."""
    place = tl.program_id(0) * W + tl.arange(0, W)
    inside = place < size
    total = tl.zeros([N, W], tl.float32)
    for first in range(0, programs, N):
        program = first + tl.arange(0, N)
        both = (program < programs)[:, None] & inside[None, :]
        total += tl.load(partial + program[:, None] * size + place[None, :], mask=both, other=0.0)
    tl.store(out + place, tl.load(residual + place, mask=inside, other=0.0) + tl.sum(total, 0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_records(homes, layers, neurons, target, slots, words: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
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
    """Buffers that all layers share. ids int32 [F] and places int64 [F], the addresses of their records; count int32
    [1]; h fp32 [B, F]; partial fp32 [P, B, D]."""

    ids: torch.Tensor
    places: torch.Tensor
    count: torch.Tensor
    h: torch.Tensor
    partial: torch.Tensor

    @classmethod
    def make(cls, rows: int, num_neurons: int, hidden: int, programs: int, device: str) -> SparseScratch:
        return cls(
            torch.zeros(num_neurons, dtype=torch.int32, device=device),
            torch.zeros(num_neurons, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(rows, num_neurons, device=device),
            torch.zeros(programs, rows, hidden, device=device),
        )


@dataclass(frozen=True, slots=True)
class LayerRecords:
    """Where a layer's records are. home uint8 [F, stride] in registered main memory; slab uint8 [S, stride] of all
    layers on the GPU; slots int32 [F]: place in the slab, or -1; score fp32 [F]: decayed count of uses; counters int64
    [4], see COUNTERS: records looked up and found in a slot, down vectors read of either memory."""

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
    own, item = mask.view(torch.uint8), dtype.itemsize
    home, slab, c, align = records.home.data_ptr(), records.slab.data_ptr(), records.counters, 16
    align = math.gcd(stride, hidden * item, align)
    _take[(-(-num // BLOCK),)](
        own, records.slots, records.score, scratch.ids, scratch.places, scratch.count, c, slab, home, num, stride,
        decay, rows, BLOCK=BLOCK, PAST=8192, num_warps=8,
    )  # fmt: skip
    wide = min(1024, triton.next_power_of_2(hidden))
    together = 4 if rows == 1 else 2 if rows <= 4 else 1  # neurons whose loads are under way at once
    _factors[(factor_programs,)](
        x, scratch.ids, scratch.places, scratch.count, own, scratch.h, num, num,
        hidden, GATED=gated, SQUARED=squared, ROWS=rows, N=together, W=wide, TYPE=_TYPES[dtype], ALIGN=align,
    )  # fmt: skip
    wide = min(1024 if rows <= 4 else 512, wide)  # 16 or 8 bytes a thread; the sums fit registers
    programs = scratch.partial.shape[0]
    _down[(programs, -(-hidden // wide))](
        scratch.h, scratch.places, scratch.count, scratch.partial, c, slab, slab + records.slab.nbytes, num,
        (2 if gated else 1) * hidden * item,
        hidden, ROWS=rows, N=together, W=wide, TYPE=_TYPES[dtype], ALIGN=align,
    )  # fmt: skip
    size = rows * hidden
    _reduce[(-(-size // 32),)](scratch.partial, residual, out, size, programs, N=64, W=32)


def copy_records(
    homes: torch.Tensor, layers: torch.Tensor, neurons: torch.Tensor, slab: torch.Tensor, slots: torch.Tensor
) -> None:
    """Copies records `neurons` of `layers` (int64 [K] both), read at the homes' addresses int64 [L], into `slots`
    int32 [K] of the slab uint8 [S, stride], whose stride is theirs."""
    if neurons.numel():
        words, align = slab.view(torch.int64), math.gcd(slab.shape[1], 16)
        _copy_records[(neurons.numel(),)](homes, layers, neurons, words, slots, words.shape[1], BLOCK=1024, ALIGN=align)
