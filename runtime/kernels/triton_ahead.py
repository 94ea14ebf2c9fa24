"""Records that the next layer will surely want, fetched over the link while it would be idle.

Between a layer's FFN and the next one's, attention and predictor run, which read GPU memory alone. A guess at the next
layer's set (as Deja Vu, arXiv 2310.17157, and its successors have it: neighbouring layers see nearly one residual) says
what to fetch meanwhile; the true set decides what is computed. A wrong guess costs the bytes of a link that is idle,
but for the records that are under way when the next FFN could begin, which it waits for.
Shapes: B rows, F neurons, P programs, M records that can be fetched for a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.triton_launch import after_others, chained
from runtime.kernels.triton_masks import PLACES

_PROGRAMS, _UNDER_WAY = 32, 384 << 10  # that fetch, and bytes of theirs that come at once, at most
_BLOCK = 4096  # words at once, at most
_PATIENT = 20_000  # looks at how much is done, some 10 ms
FATES = 4  # numbers of a layer, of which two are used: its address is then as round as any other's
_KNOWN, _PATIENCE = 4096, 64  # fetched, of which a layer's guesses are judged by; and before they are judged at all


@dataclass(frozen=True, slots=True)
class Fetched:
    """Of one layer. table int32 [F]: the slot that a neuron was fetched into, or -1; ids int32 [P, M / P] and count
    int32 [P]: who is to be fetched; fates int32 [FATES]: how many were fetched of late, and of these wanted; faded:
    those of a layer that nobody is at; slots: the first of M."""

    table: torch.Tensor
    ids: torch.Tensor
    count: torch.Tensor
    fates: torch.Tensor
    faded: torch.Tensor
    slots: int


def programs(stride: int) -> int:
    """P: few enough for the kernels beside them, and for what is under way to have come by the time scores are made."""
    return next((n for n in (_PROGRAMS, _PROGRAMS // 2, _PROGRAMS // 4) if n * stride <= _UNDER_WAY), _PROGRAMS // 8)


@triton.jit  # type: ignore[untyped-decorator]
def _chosen(  # type: ignore[no-untyped-def]
    mask, live, table, fetched, ids, count, fates, faded, NUM: tl.constexpr, LANES: tl.constexpr, B: tl.constexpr,
    EACH: tl.constexpr, KNOWN: tl.constexpr, PATIENCE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A program's own neurons. Guesses that are wrong more often than right are given up, and tried again once what is
    known of them has faded."""
    program = tl.program_id(0)
    id = program + tl.num_programs(0) * tl.arange(0, LANES)
    inside = id < NUM
    after_others(CHAINED)
    guessed = tl.zeros([LANES], tl.int32)
    for row in tl.static_range(B):
        there = inside & (tl.load(live + row) != 0)
        guessed |= tl.load(mask + row * NUM + id, mask=there, other=0).to(tl.int32)
    slot = tl.load(table + id, mask=inside, other=0)
    trusted = 2 * tl.load(fates + 1) + PATIENCE >= tl.load(fates)
    chosen = ((guessed != 0) & (slot < 0) & trusted).to(tl.int32)
    k = tl.cumsum(chosen, 0) - 1
    tl.store(ids + program * EACH + k, id, mask=(chosen != 0) & (k < EACH))
    tl.store(count + program, tl.minimum(tl.sum(chosen, 0), EACH))
    tl.store(fetched + id, tl.full([LANES], -1, tl.int32), mask=inside)
    came, wanted, alone = tl.load(faded), tl.load(faded + 1), program == 0
    right, many = 2 * wanted + PATIENCE >= came, came > KNOWN
    tl.store(faded, tl.where(right, tl.where(many, came // 2, came), came - (came + 63) // 64), mask=alone)
    tl.store(faded + 1, tl.where(right & many, wanted // 2, wanted), mask=alone)


def choose(mask: torch.Tensor, live: torch.Tensor, table: torch.Tensor, fetched: Fetched) -> None:
    """Of mask uint8 [B, F], the neurons that table int32 [F] gives no slot are to be fetched, as far as there is room
    for them; none has been so far. A row whose `live` int64 [B] is zero guesses nothing."""
    (rows, num), (count, each) = mask.shape, fetched.ids.shape
    _chosen[(count,)](
        mask, live, table, fetched.table, fetched.ids, fetched.count, fetched.fates, fetched.faded, NUM=num,
        LANES=triton.next_power_of_2(triton.cdiv(num, count)), B=rows, EACH=each, KNOWN=_KNOWN, PATIENCE=_PATIENCE,
        **chained(mask),
    )  # fmt: skip


@triton.jit
def _looked(at):  # type: ignore[no-untyped-def]
    """Where the decoder is: asked by one thread, so that all of a program go the same way."""
    return tl.atomic_add(at, 0, sem="relaxed")


@triton.jit(do_not_specialize=["begun", "enough", "over", "first"])  # type: ignore[untyped-decorator]
def _fetch(  # type: ignore[no-untyped-def]
    home, slab, ids, count, fetched, fates, counted, at, begun, enough, over, first, EACH: tl.constexpr,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, PATIENT: tl.constexpr,
):  # fmt: skip
    """From when a layer's programs have ended, as the one that waits here knows sooner than one that is launched then,
    as long as the decoder is at that layer. Waiting ends by itself, should that layer's kernel not run beside it, and
    counts as guesses gone wrong, so that it is not done again and again."""
    own, polls = tl.program_id(0) * EACH, tl.zeros([], tl.int32)
    i, num = own, own + tl.load(count + tl.program_id(0))
    now = _looked(at)
    while (i < num) & (now >= begun) & (now < enough) & (polls < PATIENT):
        now = _looked(at)
        polls += 1
    if polls == PATIENT:
        tl.atomic_add(fates, num - own, sem="relaxed")
    num = tl.where(now >= enough, num, own)
    while (i < num) & (now >= enough) & (now < over):
        neuron = tl.load(ids + i)
        source = home + neuron.to(tl.int64) * WORDS
        target = slab + (first + i).to(tl.int64) * WORDS
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(target + word, tl.load(source + word, mask=word < WORDS), mask=word < WORDS)
        tl.store(fetched + neuron, first + i)
        i += 1
        now = _looked(at)
    if i > own:
        tl.atomic_add(fates, i - own, sem="relaxed")
        tl.atomic_add(counted, (i - own).to(tl.int64), sem="relaxed")


def fetch(
    home: torch.Tensor,
    slab: torch.Tensor,
    fetched: Fetched,
    at: torch.Tensor,
    layer: int,
    enough: int,
    counted: torch.Tensor,
) -> None:
    """Copies the chosen records of home int32 [F, W] into slab int32 [S, W], in their order, from when the decoder is
    `at` (see `Trail`) `layer` with `enough` done until it is elsewhere: who comes in time is in the table. counted
    int64 [1] grows by them."""
    words, begun = slab.shape[1], layer * PLACES
    _fetch[(fetched.ids.shape[0],)](
        home, slab, fetched.ids, fetched.count, fetched.table, fetched.fates, counted, at, begun,
        begun + enough, begun + PLACES, fetched.slots, EACH=fetched.ids.shape[1], WORDS=words,
        BLOCK=min(_BLOCK, triton.next_power_of_2(words)),
        PATIENT=_PATIENT, num_warps=8,
    )  # fmt: skip
