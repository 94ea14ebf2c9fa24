"""Which neurons a ReLU-family gate lets through, from gates that are resident as they are. Shapes: B, F, D as ever."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUMBERS = 4096  # of a tile


@triton.jit  # type: ignore[untyped-decorator]
def _masks(x, gates, mask, num_neurons, HIDDEN: tl.constexpr, B: tl.constexpr, N: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    ids, rows = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, B)
    there = ids < num_neurons
    total = tl.zeros([N, B], tl.float32)
    for start in range(0, HIDDEN, W):
        place = start + tl.arange(0, W)
        inside = place < HIDDEN
        at = ids.to(tl.int64)[:, None] * HIDDEN + place[None, :]
        weight = tl.load(gates + at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        xs = tl.load(x + rows[:, None] * HIDDEN + place[None, :], mask=inside[None, :], other=0.0)
        total += tl.sum(weight[:, None, :] * xs[None, :, :], axis=2)
    at = mask + rows[None, :] * num_neurons + ids[:, None]
    tl.store(at, (total > 0).to(tl.uint8), mask=there[:, None])


def gate_masks(x: torch.Tensor, gates: torch.Tensor, mask: torch.Tensor) -> None:
    """mask uint8 [B, F]: 1 where gate x > 0; x fp32 [B, D], B a power of two, gates [F, D] fp32, fp16 or bf16."""
    rows, hidden = x.shape
    wide = min(1024, triton.next_power_of_2(hidden))
    tile = max(1, _NUMBERS // (wide * rows))
    _masks[(triton.cdiv(gates.shape[0], tile),)](x, gates, mask, gates.shape[0], HIDDEN=hidden, B=rows, N=tile, W=wide)
