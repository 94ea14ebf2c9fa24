"""Which neurons deserve a layer's slots: ranked, and what changes is copied, without a word from the host.

Shapes: L layers, F neurons, S slots, W words of a record, P programs of a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COPYING = 8  # programs of a layer that copy: few, so that those who wait for the link are served first
_BLOCK = 4096  # words at once, at most


@triton.jit  # type: ignore[untyped-decorator]
def _rank(  # type: ignore[no-untyped-def]
    score, used, table, wanted, neurons, slots, moves, swapped, decay, favour, NUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One layer. The lowest score that still gets a slot is found bit by bit: scores are not negative, so that their
    bits order them; of equals the first ones stay."""
    layer, id = tl.program_id(0), tl.arange(0, WIDE)
    inside, at = id < NUM, layer * NUM + id
    new = tl.load(score + at, mask=inside, other=0.0) * decay + tl.load(used + at, mask=inside, other=0).to(tl.float32)
    tl.store(score + at, new, mask=inside)
    tl.store(used + at, tl.zeros([WIDE], tl.int32), mask=inside)
    slot, places = tl.load(table + at, mask=inside, other=-1), tl.load(wanted + layer)
    resident = slot >= 0
    bits = tl.where(inside, tl.where(resident, new * favour, new).to(tl.int32, bitcast=True), -1)
    lowest = tl.zeros([], tl.int32)
    for i in range(31):
        more = lowest | (1 << (30 - i))
        enough = tl.sum((bits >= more).to(tl.int32), 0) >= places
        lowest = tl.where(enough, more, lowest)
    above, equal = (bits > lowest).to(tl.int32), (bits == lowest).to(tl.int32)
    chosen = (above != 0) | ((equal != 0) & (tl.cumsum(equal, 0) <= places - tl.sum(above, 0)))
    comes, goes = chosen & (slot < 0), resident & (chosen == 0)
    tl.store(neurons + layer * NUM + tl.cumsum(comes.to(tl.int32), 0) - 1, id, mask=comes)
    tl.store(slots + layer * NUM + tl.cumsum(goes.to(tl.int32), 0) - 1, slot, mask=goes)
    tl.store(table + at, tl.full([WIDE], -1, tl.int32), mask=goes)
    num = tl.sum(comes.to(tl.int32), 0)
    tl.store(moves + layer, num)
    tl.atomic_add(swapped, num.to(tl.int64), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    home, slab, table, neurons, slots, moves, NUM: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Records of a layer's newcomers into the slots that became free."""
    layer, i = tl.program_id(0), tl.program_id(1)
    num = tl.load(moves + layer)
    while i < num:
        neuron, slot = tl.load(neurons + layer * NUM + i), tl.load(slots + layer * NUM + i)
        source = home + (layer * NUM + neuron).to(tl.int64) * WORDS
        target = slab + slot.to(tl.int64) * WORDS
        for start in range(0, WORDS, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(target + place, tl.load(source + place, mask=place < WORDS), mask=place < WORDS)
        tl.store(table + layer * NUM + neuron, slot)
        i += tl.num_programs(1)


def rerank(
    score: torch.Tensor,
    used: torch.Tensor,
    table: torch.Tensor,
    wanted: torch.Tensor,
    home: torch.Tensor,
    slab: torch.Tensor,
    moves: torch.Tensor,
    swapped: torch.Tensor,
    decay: float,
    favour: float,
) -> None:
    """score fp32 [L, F] = score * decay + used, used int32 [L, F] becomes zero; in each layer the best neurons, as many
    as it has slots, get them: table int32 [L, F] and slab int32 [S, W] follow, out of home int32 [L F, W].

    wanted int32 [L]: slots of a layer, all of them taken. favour: that those who have a slot are multiplied with before
    they are compared, at least 1: a swap costs bytes. moves int32 [1 + 2 F, L]: scratch. swapped int64 [1]: grows.
    """
    (layers, num), words = table.shape, slab.shape[1]
    count, lists = moves[0], moves[1:].view(2, -1)
    _rank[(layers,)](
        score, used, table, wanted, lists[0], lists[1], count, swapped, decay, favour, NUM=num,
        WIDE=triton.next_power_of_2(num), num_warps=32 if num > 4096 else 4,
    )  # fmt: skip
    _move[(layers, _COPYING)](
        home,
        slab,
        table,
        lists[0],
        lists[1],
        count,
        NUM=num,
        WORDS=words,
        BLOCK=min(_BLOCK, triton.next_power_of_2(words)),
    )
