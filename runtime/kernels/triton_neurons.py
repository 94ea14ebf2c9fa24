"""An FFN's neurons out of two memories: the wanted ones are listed, gate and up are read, then down of the survivors.

A record is read from its slot when the neuron has one, from its home otherwise: main memory that is mapped for the
GPU, which the kernels read over the link by themselves, a few KB at a time. The list holds any set, the whole layer
included, so that nothing overflows; no word is exchanged with the host, so that a CUDA graph can hold a step. Masks are
per row: who is in a batch decides what is read and in which order sums are made, and nothing else.
Shapes: B rows (a power of two), F neurons, D hidden, S slots, K listed neurons, P programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cache.bundle import BundleDtype, BundleLayout
from runtime.kernels.triton_act import ACTS, activated
from runtime.kernels.triton_ahead import Fetched
from runtime.kernels.triton_launch import after_others, by_bits, chained, laid_out
from runtime.kernels.triton_masks import Scoring, bits_of_wanted

# Counters are added to "relaxed": nothing is said by them, and a program that orders its other stores before them waits
# for memory once for each of them.
LOOKUPS, HITS, DOWN_MISSES, DOWN_HITS, ACTIVE, PREDICTED, SWAPPED, FETCHED, FETCHED_HITS, NUM_COUNTERS = *range(9), 9
_SUMS, _SUMMED = 128, 256  # programs that sum the output, each its share of the neurons; of these, added up at once
FEW, LONGEST = 2, 4096  # rows and their width, up to which programs go through neurons that miss one by one
_PROGRAMS, _WARPS = 396, 4  # of these, three a processor of an H100
_FACTOR_PROGRAMS = 1056
_SHARED = 227 << 10  # bytes of shared memory that a program can have
_SHARES, _SHARE = 264, 8  # programs that find their neurons in bits, two a processor; neurons of these at once
_WHOLE_ROWS, _WHOLE_AHEAD, _WHOLE_WIDE = 8, 2, 512  # of downs of a whole layer: a tile, how many at once, columns
_LISTED, _PAST = 512, 32768  # neurons of a program that lists, and of those before that it counts at once
_FETCHED = 16384  # weights of records that a program has under way, at most
_TILES = (1024, 512, 256)  # of a vector at once
_TYPES = {
    BundleDtype.BF16: tl.bfloat16,
    BundleDtype.FP16: tl.float16,
    BundleDtype.FP32: tl.float32,
    BundleDtype.INT8: tl.int8,
}


@dataclass(frozen=True, slots=True)
class Records:
    """Where a layer's records are. home uint8 [F, stride] in (registered) main memory and slab uint8 [S, stride] on the
    device; table int32 [F]: a neuron's slot, or -1. resident: all of them have one. where int64 [F]: addresses of the
    records that have no slot, as somebody writes them before each step; home then means nothing. For `few_rows` of a
    step: fetched: those that came early, into slots of the same slab; done int32 [1]: to which each program adds one as
    it ends."""

    home: torch.Tensor
    slab: torch.Tensor
    table: torch.Tensor
    layout: BundleLayout
    resident: bool = False
    where: torch.Tensor | None = None
    fetched: Fetched | None = None
    done: torch.Tensor | None = None


def num_programs(device: torch.device) -> int:
    """Of `few_rows`: what `Records.done` grows by."""
    return _PROGRAMS if device.type == "cuda" else 3


def few_rows(rows: int, hidden: int) -> bool:
    """Whether a step goes through neurons that miss one by one."""
    return rows <= FEW and hidden <= LONGEST


@dataclass(frozen=True, slots=True)
class Scratch:
    """Buffers that all layers share. ids int32 [F] and places int64 [F], the addresses of their records (without a
    list: what programs have found, and words of bits); count int32 [1]; h fp32 [B F]; partial fp32 [P B D], as `sums`
    counts."""

    ids: torch.Tensor
    places: torch.Tensor
    count: torch.Tensor
    h: torch.Tensor
    partial: torch.Tensor

    @classmethod
    def make(cls, rows: int, num_neurons: int, hidden: int, device: torch.device) -> Scratch:
        """For up to so many rows."""
        return cls(
            torch.zeros(num_neurons + _PROGRAMS, dtype=torch.int32, device=device),
            torch.zeros(num_neurons + _PROGRAMS, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(rows * num_neurons, device=device),
            torch.zeros(sums(rows) * hidden, device=device),
        )


def sums(rows: int) -> int:
    """P B, at most, of up to so many rows."""
    return max(_SUMS * rows, _PROGRAMS * min(rows, FEW))


@triton.jit  # type: ignore[untyped-decorator]
def _list(  # type: ignore[no-untyped-def]
    mask, live, table, used, ids, places, count, counters, slab, home, where, stride, NUM: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr, PAST: tl.constexpr, WORDS: tl.constexpr, INDIRECT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Each program writes ids and addresses of its block behind those of the blocks before, which it counts itself."""
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(table + place, mask=place < NUM, other=-1)
    uses = tl.load(used + place, mask=place < NUM, other=0)
    alive = tl.load(live + tl.arange(0, B)) != 0  # who is padding is known from before the step
    after_others(CHAINED)
    row = tl.arange(0, B)[:, None]
    own = tl.load(mask + row * NUM + place[None, :], mask=alive[:, None] & (place < NUM)[None, :], other=0).to(tl.int32)
    before = tl.zeros([], tl.int32)
    at = block * 0
    while at < block * BLOCK:
        if WORDS:  # four neurons of a word at once: two counts of two in it, then their sums
            earlier = at // 4 + tl.arange(0, PAST // 4)
            words = tl.zeros([PAST // 4], tl.int32)
            for other in tl.static_range(B):
                there = (earlier < block * BLOCK // 4) & (tl.load(live + other) != 0)
                words |= tl.load(mask.to(tl.pointer_type(tl.int32)) + other * (NUM // 4) + earlier, mask=there, other=0)
            both = tl.sum((words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF))
            before += (both & 0xFFFF) + (both >> 16)
        else:
            earlier = at + tl.arange(0, PAST)
            taken = tl.zeros([PAST], tl.int32)
            for other in tl.static_range(B):
                there = (earlier < block * BLOCK) & (tl.load(live + other) != 0)
                taken |= tl.load(mask + other * NUM + earlier, mask=there, other=0).to(tl.int32)
            before += tl.sum(taken)
        at += PAST
    taken, predicted = tl.max(own, 0), tl.sum(tl.sum(own, 1), 0).to(tl.int64)
    k = before + tl.cumsum(taken, 0) - taken
    if INDIRECT:
        elsewhere = tl.load(where + place, mask=(taken > 0) & (slot < 0), other=0)
    else:
        elsewhere = home + place.to(tl.int64) * stride
    wide = tl.where(slot >= 0, slab + slot.to(tl.int64) * stride, elsewhere)
    tl.store(ids + k, place, mask=taken > 0)
    tl.store(places + k, wide, mask=taken > 0)
    tl.store(used + place, uses + 1, mask=taken > 0)
    resident = (slot >= 0) & (taken > 0)
    tl.atomic_add(counters + 0, tl.sum(taken).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, tl.sum(resident.to(tl.int32)).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 5, predicted, sem="relaxed")
    if block * BLOCK + BLOCK >= NUM:
        tl.store(count, before + tl.sum(taken))


@triton.jit  # type: ignore[untyped-decorator]
def _fetched(  # type: ignore[no-untyped-def]
    place, there, at: tl.constexpr, D: tl.constexpr, W: tl.constexpr, T: tl.constexpr, TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The vectors that lie `at` numbers behind the addresses [N] of their records, [N, W] at a time, all under way at
    once."""
    pointer, tiles = tl.multiple_of(place.to(tl.pointer_type(TYPE)), ALIGN), ()
    for i in tl.static_range(T):
        column = i * W + tl.arange(0, W)
        both = there[:, None] & (column < D)[None, :]
        tiles += (tl.load(pointer[:, None] + at + column[None, :], mask=both, other=0),)  # type: ignore[assignment]
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def _dots(  # type: ignore[no-untyped-def]
    tiles, place, there, x, row, at: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
    T: tl.constexpr, AHEAD_T: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """x [B, D] times the vectors, fp32 [N, B]; with no tiles ahead, they are read one after the other: rows are so many
    then that registers are short."""
    sums = tl.zeros([N, B, W], tl.float32)
    if AHEAD_T > 0:
        for i in tl.static_range(T):
            column = i * W + tl.arange(0, W)
            xs = tl.load(x + row[:, None] * D + column[None, :], mask=(column < D)[None, :], other=0.0)
            sums += tiles[i].to(tl.float32)[:, None, :] * xs[None, :, :]
    else:
        pointer = tl.multiple_of(place.to(tl.pointer_type(TYPE)), ALIGN)
        for i in range(T):
            column = i * W + tl.arange(0, W)
            inside = column < D
            xs = tl.load(x + row[:, None] * D + column[None, :], mask=inside[None, :], other=0.0)
            weight = tl.load(pointer[:, None] + at + column[None, :], mask=there[:, None] & inside[None, :], other=0)
            sums += weight.to(tl.float32)[:, None, :] * xs[None, :, :]
    return tl.sum(sums, 2)


@triton.jit  # type: ignore[untyped-decorator]
def _listed(ids, places, table, slab, home, stride, k, NUM: tl.constexpr, LISTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The k-th neurons of the list and their addresses, read beside its length, so that past it they mean nothing;
    without a list, the k-th neurons."""
    inside = k < NUM
    if LISTED:
        neuron, place = tl.load(ids + k, mask=inside, other=0), tl.load(places + k, mask=inside, other=0)
    else:
        neuron, slot = k, tl.load(table + k, mask=inside, other=-1)
        place = tl.where(slot >= 0, slab + slot.to(tl.int64) * stride, home + k.to(tl.int64) * stride)
    return neuron, place


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    x, ids, places, count, mask, live, table, active_at, h, counters, slab, home, stride, NUM: tl.constexpr,
    GATE_AT: tl.constexpr, UP_AT: tl.constexpr, GATE_SCALE: tl.constexpr, UP_SCALE: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    T: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr, SCALED: tl.constexpr, LISTED: tl.constexpr,
    COUNTED: tl.constexpr, AHEAD_T: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """h[row, k] = act(up . x), or act(gate . x) * (up . x), of the k-th listed neuron; 0 where the row wants it not.
    Without a list it is the k-th neuron, whose address is kept for `_down`."""
    row = tl.arange(0, B)
    alive = tl.load(live + row) != 0
    first = tl.program_id(0) * N
    k = first + tl.arange(0, N)
    if LISTED:
        after_others(CHAINED)
        total = tl.load(count)
    else:
        total = NUM * tl.max(alive.to(tl.int32), 0)
    active, hits = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    neuron, place = _listed(ids, places, table, slab, home, stride, k, NUM, LISTED)
    tiles = _fetched(place, k < total, UP_AT, D, W, AHEAD_T, TYPE, ALIGN)
    if not LISTED:  # where all records are, and who is padding, is known from before
        after_others(CHAINED)
    while first < total:
        there = k < total
        if not LISTED:
            tl.store(places + k, place, mask=there)
            hits += tl.sum(((place < home) | (place >= home + NUM * stride)).to(tl.int64) * there, 0)
        if GATED:
            gate_tiles = _fetched(place, there, GATE_AT, D, W, AHEAD_T, TYPE, ALIGN)
        if COUNTED:
            least = tl.load(active_at + neuron, mask=there, other=0.0)
        up = _dots(tiles, place, there, x, row, UP_AT, D, N, B, W, T, AHEAD_T, TYPE, ALIGN)
        if SCALED:
            up *= tl.load((place + UP_SCALE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)[:, None]
        z = up
        if GATED:
            z = _dots(gate_tiles, place, there, x, row, GATE_AT, D, N, B, W, T, AHEAD_T, TYPE, ALIGN)
            if SCALED:
                z *= tl.load((place + GATE_SCALE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)[:, None]
        z = activated(z, ACT)
        value = tl.where(z == 0, 0.0, z * up) if GATED else z
        own = there[:, None] & alive[None, :]
        if LISTED and B > 1:  # one row alone wants all that is listed
            own = own & (tl.load(mask + row[None, :] * NUM + neuron[:, None], mask=own, other=0) != 0)
        value = tl.where(own, value, 0.0)
        tl.store(h + row[None, :] * NUM + k[:, None], value, mask=there[:, None])
        if COUNTED:
            reached = (tl.abs(value) >= least[:, None]) & (value != 0)
            active += tl.sum(tl.sum(reached.to(tl.int32), 1), 0).to(tl.int64)
        first += tl.num_programs(0) * N
        k = first + tl.arange(0, N)
        neuron, place = _listed(ids, places, table, slab, home, stride, k, NUM, LISTED)
        tiles = _fetched(place, k < total, UP_AT, D, W, AHEAD_T, TYPE, ALIGN)
    if COUNTED:
        tl.atomic_add(counters + 4, active, sem="relaxed")
    if not LISTED:
        tl.atomic_add(counters + 1, hits, sem="relaxed")
        if tl.program_id(0) == 0:
            tl.atomic_add(counters + 0, total.to(tl.int64), sem="relaxed")
            tl.store(count, total)


@triton.jit  # type: ignore[untyped-decorator]
def _survivors(h, places, row, k, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factors fp32 [N, B] and addresses of the k-th of the list, read beside its length: past it they mean nothing."""
    inside = k < NUM
    factor = tl.load(h + row[None, :] * NUM + k[:, None], mask=inside[:, None], other=0.0)
    return factor, tl.load(places + k, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _down(  # type: ignore[no-untyped-def]
    h, places, count, partial, counters, slab, slab_end, NUM: tl.constexpr,
    DOWN_AT: tl.constexpr, DOWN_SCALE: tl.constexpr, B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    TYPE: tl.constexpr, ALIGN: tl.constexpr, SCALED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """partial[program, row, tile of D] = sum over the program's share of the list, factors of zero left out."""
    program = tl.program_id(0)
    column = tl.program_id(1) * W + tl.arange(0, W)
    row = tl.arange(0, B)
    after_others(CHAINED)
    total = tl.load(count)
    misses, hits = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    out = tl.zeros([B, W], tl.float32)
    first = program * N
    k = first + tl.arange(0, N)
    factor, place = _survivors(h, places, row, k, NUM)
    while first < total:
        factor = tl.where((k < total)[:, None], factor, 0.0)
        wanted = tl.max((factor != 0).to(tl.int32), 1) != 0
        resident = wanted & (place >= slab) & (place < slab_end)
        hits += tl.sum(resident.to(tl.int64), 0)
        misses += tl.sum((wanted & (resident == 0)).to(tl.int64), 0)
        record = tl.multiple_of(place.to(tl.pointer_type(TYPE)), ALIGN)
        inside = wanted[:, None] & (column < D)[None, :]
        vector = tl.load(record[:, None] + DOWN_AT + column[None, :], mask=inside, other=0).to(tl.float32)  # [N, W]
        if SCALED:
            factor *= tl.load((place + DOWN_SCALE).to(tl.pointer_type(tl.float32)), mask=wanted, other=0.0)[:, None]
        out += tl.sum(factor[:, :, None] * vector[:, None, :], 0)
        first += tl.num_programs(0) * N
        k = first + tl.arange(0, N)
        factor, place = _survivors(h, places, row, k, NUM)
    tl.store(partial + (program * B + row[:, None]) * D + column[None, :], out, mask=(column < D)[None, :])
    if tl.program_id(1) == 0:
        tl.atomic_add(counters + 2, misses, sem="relaxed")
        tl.atomic_add(counters + 3, hits, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _whole(  # type: ignore[no-untyped-def]
    x, norm, table, live, h, slab, stride, eps, NUM: tl.constexpr, GATE_AT: tl.constexpr, UP_AT: tl.constexpr,
    GATE_SCALE: tl.constexpr, UP_SCALE: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, T: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr, SCALED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """h[k] = the k-th neuron's factor of one row x, which passes an RMS norm, where the layer's records all lie in the
    slab, in their order: nothing is looked up, and all that a program reads is on its way at once."""
    k = tl.program_id(0) * N + tl.arange(0, N)
    there = k < NUM
    place = slab + (tl.load(table) + k).to(tl.int64) * stride
    ups, gates = _fetched(place, there, UP_AT, D, W, T, TYPE, ALIGN), ()
    if GATED:
        gates = _fetched(place, there, GATE_AT, D, W, T, TYPE, ALIGN)
    alive = tl.load(live) != 0
    after_others(CHAINED)
    up, gate, square = tl.zeros([N, W], tl.float32), tl.zeros([N, W], tl.float32), tl.zeros([W], tl.float32)
    for i in tl.static_range(T):
        column = i * W + tl.arange(0, W)
        xs = tl.load(x + column, mask=column < D, other=0.0)
        square += xs * xs
        xs *= tl.load(norm + column, mask=column < D, other=0.0)
        up += ups[i].to(tl.float32) * xs[None, :]
        if GATED:
            gate += gates[i].to(tl.float32) * xs[None, :]
    scale = tl.rsqrt(tl.sum(square, 0) / D + eps)
    value = tl.sum(up, 1) * scale
    if SCALED:
        value *= tl.load((place + UP_SCALE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
    if GATED:
        z = tl.sum(gate, 1) * scale
        if SCALED:
            z *= tl.load((place + GATE_SCALE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
        z = activated(z, ACT)
        value = tl.where(z == 0, 0.0, z * value)
    else:
        value = activated(value, ACT)
    tl.store(h + k, tl.where(alive, value, 0.0), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _whole_down(  # type: ignore[no-untyped-def]
    h, table, live, partial, counters, slab, stride, NUM: tl.constexpr, DOWN_AT: tl.constexpr,
    DOWN_SCALE: tl.constexpr, D: tl.constexpr, N: tl.constexpr, U: tl.constexpr, W: tl.constexpr, TYPE: tl.constexpr,
    ALIGN: tl.constexpr, SCALED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """As `_down` of such a layer: factors of zero are left out, U tiles of N neurons are read at once."""
    lane, step = tl.arange(0, N), tl.num_programs(0) * N
    column = tl.program_id(1) * W + tl.arange(0, W)
    base = slab + tl.load(table).to(tl.int64) * stride
    alive = tl.load(live) != 0
    after_others(CHAINED)
    out, hits = tl.zeros([W], tl.float32), tl.zeros([], tl.int64)
    first, factors = tl.program_id(0) * N, ()
    for u in tl.static_range(U):
        k = first + u * step + lane
        factors += (tl.load(h + k, mask=k < NUM, other=0.0),)  # type: ignore[assignment]
    while first < NUM:
        vectors, more = (), ()
        for u in tl.static_range(U):
            record = base + (first + u * step + lane).to(tl.int64) * stride
            vectors += _part(record, factors[u], column, DOWN_AT, DOWN_SCALE, D, TYPE, ALIGN, SCALED)
        first += U * step
        for u in tl.static_range(U):
            k = first + u * step + lane
            more += (tl.load(h + k, mask=k < NUM, other=0.0),)  # type: ignore[assignment]
        for u in tl.static_range(U):
            out, hits = _with_part(out, hits, vectors, u)
        factors = more
    tl.store(partial + tl.program_id(0) * D + column, out, mask=column < D)
    if tl.program_id(1) == 0:
        tl.atomic_add(counters + 3, hits, sem="relaxed")
        if (tl.program_id(0) == 0) & alive:
            tl.atomic_add(counters + 0, NUM, sem="relaxed")
            tl.atomic_add(counters + 1, NUM, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    place, factor, column, at: tl.constexpr, scale: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr,
    ALIGN: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Columns of the vectors at `at` of records whose factor is not zero, what they are to be multiplied with, and how
    many these are."""
    pointer, there = tl.multiple_of(place.to(tl.pointer_type(TYPE)), ALIGN), factor != 0
    vector = tl.load(pointer[:, None] + at + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0)
    if SCALED:
        factor *= tl.load((place + scale).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
    return vector, factor, tl.sum(there.to(tl.int64), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _with_part(out, hits, parts, u: tl.constexpr):  # type: ignore[no-untyped-def]
    """out and hits, and the u-th of `_part`s with them."""
    return out + tl.sum(parts[3 * u + 1][:, None] * parts[3 * u].to(tl.float32), 0), hits + parts[3 * u + 2]


@triton.jit  # type: ignore[untyped-decorator]
def _neurons(  # type: ignore[no-untyped-def]
    x, ids, places, mask, live, table, used, active_at, partial, counters, slab, slab_end, home, where, fetched, fates,
    done, stride, NUM: tl.constexpr, GATE_AT: tl.constexpr, UP_AT: tl.constexpr, DOWN_AT: tl.constexpr,
    GATE_SCALE: tl.constexpr, UP_SCALE: tl.constexpr, DOWN_SCALE: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, B: tl.constexpr, D: tl.constexpr, W: tl.constexpr, T: tl.constexpr, SHARE: tl.constexpr,
    LANES: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr, SCALED: tl.constexpr, COUNTED: tl.constexpr,
    INDIRECT: tl.constexpr, EARLY: tl.constexpr, TOLD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """`_list`, `_factors` and `_down` of few rows in one. A program has every P-th neuron, SHARE of them at most
    (LANES: the power of two from there on). It lists those that are wanted and goes through them one after the other,
    each from its one end to the other; the next one's gate and up are on their way while down is.
    partial[program, row]."""
    row, own = tl.arange(0, B), tl.program_id(0) * SHARE
    alive = tl.load(live + row) != 0
    candidate = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, LANES)
    mine = candidate < NUM
    slot = tl.load(table + candidate, mask=mine, other=-1)
    uses = tl.load(used + candidate, mask=mine, other=0)
    after_others(CHAINED)
    at = mask + row[:, None] * NUM + candidate[None, :]
    asked = tl.load(at, mask=alive[:, None] & mine[None, :], other=0).to(tl.int32)
    taken = tl.max(asked, 0)
    if EARLY:
        early = tl.load(fetched + candidate, mask=mine, other=-1)
        came = tl.sum(((early >= 0) & (slot < 0) & (taken > 0)).to(tl.int32))
        slot = tl.where(slot >= 0, slot, early)
        tl.atomic_add(fates + 1, came, sem="relaxed")
        tl.atomic_add(counters + 8, came.to(tl.int64), sem="relaxed")
    if INDIRECT:
        elsewhere = tl.load(where + candidate, mask=(taken > 0) & (slot < 0), other=0)
    else:
        elsewhere = home + candidate.to(tl.int64) * stride
    k = own + tl.cumsum(taken, 0) - taken
    tl.store(ids + k, candidate, mask=taken > 0)
    tl.store(places + k, tl.where(slot >= 0, slab + slot.to(tl.int64) * stride, elsewhere), mask=taken > 0)
    tl.store(used + candidate, uses + 1, mask=taken > 0)
    total = tl.sum(taken)
    tl.atomic_add(counters + 0, total.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, tl.sum(((slot >= 0) & (taken > 0)).to(tl.int32)).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 5, tl.sum(tl.sum(asked, 1), 0).to(tl.int64), sem="relaxed")
    tl.debug_barrier()
    first, total = own, own + total
    k = first + tl.arange(0, 1)
    active, misses, hits = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    neuron, place = tl.load(ids + k, mask=k < total, other=0), tl.load(places + k, mask=k < total, other=0)
    ups, gates, sums = _fetched(place, k < total, UP_AT, D, W, T, TYPE, ALIGN), (), ()
    if GATED:
        gates = _fetched(place, k < total, GATE_AT, D, W, T, TYPE, ALIGN)
    for _ in tl.static_range(T):
        sums += (tl.zeros([B, W], tl.float32),)  # type: ignore[assignment]
    while first < total:
        there = k < total
        first += 1
        k = first + tl.arange(0, 1)
        following, after = tl.load(ids + k, mask=k < total, other=0), tl.load(places + k, mask=k < total, other=0)
        wants = there[:, None] & alive[None, :]
        if B > 1:  # one row alone wants all that is listed
            wants = wants & (tl.load(mask + row[None, :] * NUM + neuron[:, None], mask=wants, other=0) != 0)
        if COUNTED:
            least = tl.load(active_at + neuron, mask=there, other=0.0)
        up = _dots(ups, place, there, x, row, UP_AT, D, 1, B, W, T, T, TYPE, ALIGN)
        if SCALED:
            up *= tl.load((place + UP_SCALE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)[:, None]
        z = up
        if GATED:
            z = _dots(gates, place, there, x, row, GATE_AT, D, 1, B, W, T, T, TYPE, ALIGN)
            if SCALED:
                z *= tl.load((place + GATE_SCALE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)[:, None]
        z = activated(z, ACT)
        value = tl.where(wants, tl.where(z == 0, 0.0, z * up) if GATED else z, 0.0)  # [1, B]
        wanted = tl.max((value != 0).to(tl.int32), 1) != 0
        downs = _fetched(place, wanted, DOWN_AT, D, W, T, TYPE, ALIGN)
        ups = _fetched(after, k < total, UP_AT, D, W, T, TYPE, ALIGN)
        if GATED:
            gates = _fetched(after, k < total, GATE_AT, D, W, T, TYPE, ALIGN)
        if COUNTED:
            active += tl.sum(tl.sum(((tl.abs(value) >= least[:, None]) & (value != 0)).to(tl.int32), 1), 0).to(tl.int64)
        resident = wanted & (place >= slab) & (place < slab_end)
        hits += tl.sum(resident.to(tl.int64), 0)
        misses += tl.sum((wanted & (resident == 0)).to(tl.int64), 0)
        factor = value
        if SCALED:
            factor *= tl.load((place + DOWN_SCALE).to(tl.pointer_type(tl.float32)), mask=wanted, other=0.0)[:, None]
        factor = tl.reshape(factor, [B, 1])
        more = ()
        for i in tl.static_range(T):
            more += (sums[i] + factor * downs[i].to(tl.float32),)  # type: ignore[assignment]
        sums = more
        neuron, place = following, after
    if TOLD:
        tl.atomic_add(done, 1, sem="relaxed")
    for i in tl.static_range(T):
        column = i * W + tl.arange(0, W)
        at = partial + (tl.program_id(0) * B + row[:, None]) * D + column[None, :]
        tl.store(at, sums[i], mask=(column < D)[None, :] & (row >= 0)[:, None])
    tl.atomic_add(counters + 2, misses, sem="relaxed")
    tl.atomic_add(counters + 3, hits, sem="relaxed")
    if COUNTED:
        tl.atomic_add(counters + 4, active, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    partial, out, found, counters, size, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, FOUND: tl.constexpr,
    COUNTED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """out [B D] += the sum of partial [P, B D] over programs, in one order, N of them at a time. FOUND: one program
    more counts what they found, int32 [P, 4], in a layer that lies in slots: wanted, of these the survivors, and
    COUNTED, of these the active ones."""
    place, program = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, N)
    inside = place < size
    after_others(CHAINED)
    if FOUND and tl.program_id(0) == tl.num_programs(0) - 1:
        wanted, survived, active = tl.zeros([N], tl.int32), tl.zeros([N], tl.int32), tl.zeros([N], tl.int32)
        for first in tl.static_range(0, P, N):
            own, there = found + (first + program) * 4, first + program < P
            wanted += tl.load(own, mask=there, other=0)
            survived += tl.load(own + 1, mask=there, other=0)
            if COUNTED:
                active += tl.load(own + 2, mask=there, other=0)
        num = tl.sum(wanted, 0).to(tl.int64)
        tl.atomic_add(counters + 0, num, sem="relaxed")
        tl.atomic_add(counters + 1, num, sem="relaxed")
        tl.atomic_add(counters + 3, tl.sum(survived, 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + 5, num, sem="relaxed")
        if COUNTED:
            tl.atomic_add(counters + 4, tl.sum(active, 0).to(tl.int64), sem="relaxed")
    else:
        before, sums = tl.load(out + place, mask=inside, other=0.0), tl.zeros([N, W], tl.float32)
        for first in tl.static_range(0, P, N):
            both = (first + program < P)[:, None] & inside[None, :]
            sums += tl.load(partial + (first + program)[:, None] * size + place[None, :], mask=both, other=0.0)
        tl.store(out + place, before + tl.sum(sums, 0), mask=inside)


def add_whole(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    records: Records,
    act: str,
    out: torch.Tensor,
    scratch: Scratch,
    counters: torch.Tensor,
    live: torch.Tensor,
) -> None:
    """As `add_ffn`, of one row and a whole layer whose records all lie in slots, in their order; x fp32 [1, D] passes
    an RMS norm (weight fp32 [D]) first, and may be `out`."""
    hidden, num, layout = x.shape[1], records.table.shape[0], records.layout
    item, cuda = layout.dtype.item_bytes, x.is_cuda
    at = {v.name: v.offset // item for v in layout.vectors}
    scale = {v.name: v.scale_offset for v in layout.vectors}
    kind = {"TYPE": _TYPES[layout.dtype], "SCALED": layout.dtype is BundleDtype.INT8}
    kind["ALIGN"] = math.gcd(layout.stride, *(v.offset for v in layout.vectors), 16)
    slab, t = records.slab.data_ptr(), _tiling(1, hidden, layout.gated)
    _whole[(triton.cdiv(num, t.factors),)](
        x, norm, records.table, live, scratch.h, slab, layout.stride, eps, NUM=num, GATE_AT=at.get("gate", 0),
        UP_AT=at["up"], GATE_SCALE=scale.get("gate", 0), UP_SCALE=scale["up"], GATED=layout.gated, ACT=ACTS[act],
        D=hidden, N=t.factors, W=t.wide, T=triton.cdiv(hidden, t.wide), num_warps=t.warps, **kind, **chained(x),
    )  # fmt: skip
    programs = _PROGRAMS if cuda else 3
    _whole_down[(programs, triton.cdiv(hidden, _WHOLE_WIDE))](
        scratch.h, records.table, live, scratch.partial, counters, slab, layout.stride, NUM=num, DOWN_AT=at["down"],
        DOWN_SCALE=scale["down"], D=hidden, N=_WHOLE_ROWS, U=_WHOLE_AHEAD, W=_WHOLE_WIDE, num_warps=_WHOLE_WIDE // 256,
        **kind, **chained(x),
    )  # fmt: skip
    _sum(scratch.partial, out, programs)


def add_ffn(
    x: torch.Tensor,
    records: Records,
    act: str,
    mask: torch.Tensor | None,
    active_at: torch.Tensor | None,
    out: torch.Tensor,
    scratch: Scratch,
    used: torch.Tensor,
    counters: torch.Tensor,
    live: torch.Tensor,
) -> None:
    """out [B, D] += FFN(x), x fp32 [B, D], over the neurons of mask uint8 [B, F], row by row; None: all, and no list.

    B is a power of two; a row whose `live` int64 [B] is zero is padding and wants nothing. active_at fp32 [F]: what a
    factor must reach to be counted as active; None: it is not counted. used int32 [F] counts the steps that wanted a
    neuron of a mask, counters int64 [NUM_COUNTERS] neurons. ValueError for an activation that is not known.
    """
    if act not in ACTS:
        raise ValueError(f"unknown activation {act}")
    (rows, hidden), num, layout = x.shape, records.table.shape[0], records.layout
    stride = layout.stride
    item, cuda = layout.dtype.item_bytes, x.is_cuda
    at = {v.name: v.offset // item for v in layout.vectors}
    scale = {v.name: v.scale_offset for v in layout.vectors}
    kind = {"TYPE": _TYPES[layout.dtype], "SCALED": layout.dtype is BundleDtype.INT8}
    kind["ALIGN"] = math.gcd(stride, *(v.offset for v in layout.vectors), 16)
    home, slab = records.home.data_ptr(), records.slab.data_ptr()
    masks = used if mask is None else mask
    if mask is not None and few_rows(rows, hidden) and not records.resident:
        fetched = records.fetched
        programs, wide = num_programs(x.device), _wide(rows, hidden)
        share = triton.cdiv(num, programs)
        _neurons[(programs,)](
            x, scratch.ids, scratch.places, mask, live, records.table, used,
            scratch.h if active_at is None else active_at, scratch.partial, counters, slab, slab + records.slab.nbytes,
            home, records.table if records.where is None else records.where,
            records.table if fetched is None else fetched.table, records.table if fetched is None else fetched.fates,
            used if records.done is None else records.done, stride, NUM=num, GATE_AT=at.get("gate", 0),
            UP_AT=at["up"], DOWN_AT=at["down"], GATE_SCALE=scale.get("gate", 0), UP_SCALE=scale["up"],
            DOWN_SCALE=scale["down"], GATED=layout.gated, ACT=ACTS[act], B=rows, D=hidden, W=wide,
            T=triton.cdiv(hidden, wide), SHARE=share, LANES=triton.next_power_of_2(share),
            COUNTED=active_at is not None, INDIRECT=records.where is not None, EARLY=fetched is not None,
            TOLD=records.done is not None, num_warps=_WARPS, **kind, **chained(x),
        )  # fmt: skip
        _sum(scratch.partial, out, programs)
        return
    if mask is not None:
        past = min(_PAST, triton.next_power_of_2(num))
        _list[(triton.cdiv(num, _LISTED),)](
            mask, live, records.table, used, scratch.ids, scratch.places, scratch.count, counters, slab, home,
            records.table if records.where is None else records.where, stride, NUM=num, B=rows, BLOCK=_LISTED,
            PAST=past, WORDS=num % 4 == 0, INDIRECT=records.where is not None, num_warps=8, **chained(x),
        )  # fmt: skip
    t = _tiling(rows, hidden, layout.gated)
    _factors[(_FACTOR_PROGRAMS if cuda else 3,)](
        x, scratch.ids, scratch.places, scratch.count, masks, live, records.table,
        scratch.h if active_at is None else active_at, scratch.h, counters, slab, home, stride, NUM=num,
        GATE_AT=at.get("gate", 0), UP_AT=at["up"], GATE_SCALE=scale.get("gate", 0), UP_SCALE=scale["up"],
        GATED=layout.gated, ACT=ACTS[act], B=rows, D=hidden, N=t.factors, W=t.wide, T=triton.cdiv(hidden, t.wide),
        LISTED=mask is not None, COUNTED=active_at is not None,
        AHEAD_T=triton.cdiv(hidden, t.wide) if rows <= 4 else 0, num_warps=t.warps, **kind,
        **chained(x),
    )  # fmt: skip
    programs = _SUMS if cuda else 3
    _down[(programs, triton.cdiv(hidden, t.down_wide))](
        scratch.h, scratch.places, scratch.count, scratch.partial, counters, slab, slab + records.slab.nbytes, NUM=num,
        DOWN_AT=at["down"], DOWN_SCALE=scale["down"], B=rows, D=hidden, N=t.down, W=t.down_wide,
        num_warps=8 if t.down_wide > 1024 else 4, **kind, **chained(x),
    )  # fmt: skip
    _sum(scratch.partial, out, programs)


def _sum(
    partial: torch.Tensor,
    out: torch.Tensor,
    programs: int,
    found: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    counted: bool = False,
) -> None:
    """out [B, D] += what each program has; found, counted: see `_reduce`, counters get them."""
    at_once, wide = (_SUMMED, 32) if out.shape[0] > FEW else (2 * _SUMMED, 16)
    told = found is not None
    _reduce[(triton.cdiv(out.numel(), wide) + told,)](
        partial, out, partial if found is None else found, partial if counters is None else counters, out.numel(),
        P=programs, N=min(at_once, triton.next_power_of_2(programs)), W=wide, FOUND=told, COUNTED=counted, num_warps=8,
        **chained(out, early=told),
    )  # fmt: skip


def scores_itself(x: torch.Tensor, records: Records) -> bool:
    """Whether `add_scored` is for x [B, D] and these records, of which a program's share must fit in shared memory, to
    which they are copied 4 bytes at once at least."""
    (rows, hidden), layout = x.shape, records.layout
    at_a_time = math.gcd(layout.stride, hidden * layout.dtype.item_bytes, *(v.offset for v in layout.vectors))
    at_once = _SHARE * (2 if layout.gated else 1) * layout.dtype.item_bytes + 4
    fits = hidden <= LONGEST and triton.cdiv(hidden, _wide(1, hidden)) * _wide(1, hidden) * at_once <= _SHARED
    return rows == 1 and records.resident and fits and at_a_time % 8 == 0 and by_bits(x) and laid_out(x)


def add_scored(
    x: torch.Tensor,
    scoring: Scoring,
    records: Records,
    act: str,
    active_at: torch.Tensor | None,
    out: torch.Tensor,
    scratch: Scratch,
    counters: torch.Tensor,
    live: torch.Tensor,
) -> None:
    """As `add_ffn` of the mask that `plane_masks` makes, of one row and a layer whose records all lie in slots, in
    their order: no list is made. Nobody asks how often such neurons are used, and it isn't counted."""
    from runtime.kernels.gluon_neurons import wanted_added

    hidden, num, layout, words, found = x.shape[1], records.table.shape[0], records.layout, scratch.places, scratch.ids
    num_words, wide = bits_of_wanted(scoring, words), _wide(1, hidden)
    programs = min(_SHARES, triton.cdiv(num, _SHARE))
    at = {v.name: v.offset for v in layout.vectors}
    scale = {v.name: v.scale_offset for v in layout.vectors}
    wanted_added[(programs,)](
        words, x, live, records.table, scratch.h if active_at is None else active_at, records.slab.data_ptr(),
        scratch.partial, found, scoring.sketch.first, layout.stride, num_words, NUM=num,
        M=max(32, triton.next_power_of_2(num_words)), ACT=ACTS[act], GATED=layout.gated, COUNTED=active_at is not None,
        SCALED=layout.dtype is BundleDtype.INT8, GATE_AT=at.get("gate", 0), UP_AT=at["up"], DOWN_AT=at["down"],
        GATE_SCALE=scale.get("gate", 0), UP_SCALE=scale["up"], DOWN_SCALE=scale["down"], TYPE=_TYPES[layout.dtype],
        ALIGN=math.gcd(layout.stride, *at.values(), 16), D=hidden, N=_SHARE, W=wide, T=triton.cdiv(hidden, wide),
        WARPS=_WARPS, VEC=min(8, wide // (32 * _WARPS)), num_warps=_WARPS, **chained(x, early=True),
    )  # fmt: skip
    _sum(scratch.partial, out, programs, found, counters, active_at is not None)


@dataclass(frozen=True, slots=True)
class _Tiling:
    """Neurons whose gate and up are under way at once, and columns of these, for so many warps; the same of down."""

    factors: int
    wide: int
    warps: int
    down: int
    down_wide: int


def _wide(rows: int, hidden: int) -> int:
    """Columns at once."""
    sizes = [w for w in _TILES if w <= 512 or rows <= 4]
    return min(sizes, key=lambda w: (triton.cdiv(hidden, w) * w, -w))


def _tiling(rows: int, hidden: int, gated: bool) -> _Tiling:
    wide, together = _wide(rows, hidden), 4
    while together > 1 and together * hidden * (2 if gated else 1) * rows > _FETCHED:
        together //= 2
    return _Tiling(together, wide, 4, max(1, 16 // rows), min(512, wide))
