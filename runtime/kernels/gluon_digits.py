"""The bits of a row's digits, as `triton_masks._digits` makes them, with layouts that say who has what: four lanes have
the eight planes of a byte, so that a byte of each bit is put together by two exchanges between lanes, in registers.

Shapes: as in `triton_masks`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from runtime.kernels.triton_launch import after_others

BYTES = 32  # of a row of planes that a program makes


@gluon.jit  # type: ignore[untyped-decorator]
def _tiles(source, column, D: gl.constexpr, W: gl.constexpr, T: gl.constexpr, there):  # type: ignore[no-untyped-def]
    """source [D], W numbers at a time, all under way at once."""
    tiles = ()
    for i in gl.static_range(T):
        mask = (i * W + column < D) & there
        tiles += (gl.load(source + i * W + column, mask=mask, other=0.0),)  # type: ignore[assignment]
    return tiles


@gluon.jit
def _added(a1, a2, a3, b1, b2, b3):  # type: ignore[no-untyped-def]
    """Three sums at once."""
    return a1 + b1, a2 + b2, a3 + b3


@gluon.jit(do_not_specialize=["begun"])  # type: ignore[untyped-decorator]
def digits_in_bits(  # type: ignore[no-untyped-def]
    x, norm, dimension, coefficient, largest, whole1, whole2, planes, facts, h, kept, at_layer, begun, eps,
    D: gl.constexpr, W: gl.constexpr, T: gl.constexpr, WIDTH: gl.constexpr, TRAIL: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """A program has 32 bytes of planes uint8 [B, 24, WIDTH]; one more has h fp32 [B, D] and facts fp32 [B, 3], and
    leaves the TRAIL."""
    PLANES: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    OF_BYTES: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([W // 128], [32], [4], [0])
    row, alone = gl.program_id(1), gl.program_id(0) == gl.num_programs(0) - 1
    place = gl.program_id(0) * 32 + gl.arange(0, 32, gl.SliceLayout(1, PLANES))
    bit, column = gl.arange(0, 8, gl.SliceLayout(0, PLANES)), gl.arange(0, W, ROW)
    inside = (place < WIDTH)[:, None] & (bit >= 0)[None, :]
    at = place[:, None] * 8 + bit[None, :]
    source, factor = gl.load(dimension + at, mask=inside, other=0), gl.load(coefficient + at, mask=inside, other=0.0)
    everybody = column >= 0
    weights, most = _tiles(norm, column, D, W, T, everybody), _tiles(largest, column, D, W, T, everybody)
    mine = everybody & alone
    sum1, sum2 = _tiles(whole1, column, D, W, T, mine), _tiles(whole2, column, D, W, T, mine)
    factor *= gl.load(norm + source, mask=inside, other=0.0)
    after_others(CHAINED)
    if TRAIL:
        gl.store(at_layer, begun, mask=alone)
    own = x + row * D
    xs = _tiles(own, column, D, W, T, everybody)
    z = gl.load(own + source, mask=inside, other=0.0) * factor
    square, peak = gl.zeros([W], gl.float32, ROW), gl.zeros([W], gl.float32, ROW)
    normed = ()
    for i in gl.static_range(T):
        square += xs[i] * xs[i]
        normed += (xs[i] * weights[i],)  # type: ignore[assignment]
        peak = gl.maximum(peak, gl.abs(normed[i]) * most[i])
    unit = gl.maximum(gl.max(peak, 0), 1e-30) / 8000000.0
    if alone:
        total1, total2 = gl.zeros([W], gl.float32, ROW), gl.zeros([W], gl.float32, ROW)
        for i in gl.static_range(T):
            total1 += normed[i] * sum1[i]
            total2 += normed[i] * sum2[i]
        whole, first, second = gl.reduce((square, total1, total2), 0, _added)
        scale = gl.rsqrt(whole / D + eps)
        for i in gl.static_range(T):
            gl.store(h + row * D + i * W + column, normed[i] * scale, mask=i * W + column < D)
            if TRAIL:
                gl.store(kept + row * D + i * W + column, xs[i], mask=i * W + column < D)
        gl.store(facts + row * 3, unit * scale)
        gl.store(facts + row * 3 + 1, scale * first)
        gl.store(facts + row * 3 + 2, scale * second)
    else:
        number = (z / unit).to(gl.int32)
        low = ((number + 128) & 255) - 128
        number = (number - low) >> 8
        middle = ((number + 128) & 255) - 128
        high = (number - middle) >> 8
        number = ((high & 255) << 16) | ((middle & 255) << 8) | (low & 255)
        of_byte, which = gl.arange(0, 32, gl.SliceLayout(1, OF_BYTES)), gl.arange(0, 4, gl.SliceLayout(0, OF_BYTES))
        to = gl.program_id(0) * 32 + of_byte
        for i in gl.static_range(0, 24, 4):  # four planes at once, a byte of a word each
            spread = ((((number >> i) & 15) * 0x204081) & 0x01010101) << bit[None, :]
            word = gl.convert_layout(gl.sum(spread, 1), gl.SliceLayout(1, OF_BYTES))
            byte = (word[:, None] >> (8 * which)[None, :]) & 255
            there = planes + (row * 24 + i + which)[None, :] * WIDTH + to[:, None]
            gl.store(there, byte.to(gl.int8), mask=(to < WIDTH)[:, None] & (which >= 0)[None, :])
