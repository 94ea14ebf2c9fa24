"""Scores of a sketch's planes on a GPU: a row is the sum of z where its bit is set, doubled, less the sum of all z.

As `runtime/sketches.py` describes it; every row's sum is made in one order, whoever else is in the batch.
Shapes: B rows, F neurons, R bytes of codes a neuron, M planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _plane_sums(  # type: ignore[no-untyped-def]
    codes, z, out, num, width: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, BYTES: tl.constexpr
):
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, NEURONS, BYTES], tl.float32)
    total = tl.zeros([ROWS, BYTES], tl.float32)
    for at in range(0, width, BYTES):
        place = at + tl.arange(0, BYTES)
        inside = (neuron[:, None] < num) & (place[None, :] < width)
        code = tl.load(codes + neuron[:, None].to(tl.int64) * width + place[None, :], mask=inside, other=0).to(tl.int32)
        for bit in tl.static_range(8):
            here = z + (row[:, None] * 8 + bit) * width + place[None, :]
            zs = tl.load(here, mask=(place < width)[None, :], other=0.0)
            total += zs
            sums += ((code >> bit) & 1).to(tl.float32)[None, :, :] * zs[:, None, :]
    result = 2.0 * tl.sum(sums, 2) - tl.sum(total, 1)[:, None]
    tl.store(out + row[:, None] * num + neuron[None, :], result, mask=(neuron < num)[None, :])


def plane_sums(codes: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> None:
    """out fp32 [B, F] of codes uint8 [F, R] and z fp32 [B, 8, R], B a power of two: z[b, r] belongs to bit b of byte r,
    plane 8 r + b, and is 0 where there is none."""
    (num, width), rows = codes.shape, z.shape[0]
    neurons = 32 if rows == 1 else 8
    _plane_sums[(-(-num // neurons),)](codes, z, out, num, width, ROWS=rows, NEURONS=neurons, BYTES=64)


def plane_order(dimension: torch.Tensor, coefficient: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(dimension int64, coefficient fp32), both [8, R], such that x[:, dimension] * coefficient is what `plane_sums`
    takes, of the planes' own in their order [M]."""
    places = torch.zeros(8 * width, dtype=torch.int64), torch.zeros(8 * width)
    for ordered, given in zip(places, (dimension, coefficient), strict=True):
        ordered[: given.numel()] = given
    first, second = (ordered.view(width, 8).T.contiguous() for ordered in places)
    return first, second
