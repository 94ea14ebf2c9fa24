"""`triton_matvec` for one row, with layouts that say who has what: a thread has the same inputs of all outputs, so that
it loads just the row's numbers that it needs, and all of them at once, as soon as the row is there.

Left to the compiler, a row's tiles come one after the other, each through shared memory: five times the memory's
latency in a kernel that has nothing else to wait for. Shapes: as in `triton_matvec`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from runtime.kernels.triton_launch import after_others


@gluon.jit  # type: ignore[untyped-decorator]
def _numbers(source, column, D: gl.constexpr, W: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """source [D], W numbers at a time, all under way at once."""
    tiles = ()
    for i in gl.static_range(T):
        tiles += (gl.load(source + i * W + column, mask=i * W + column < D, other=0.0),)  # type: ignore[assignment]
    return tiles


@gluon.jit  # type: ignore[untyped-decorator]
def _rows(base, there, column, D: gl.constexpr, W: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The rows at base [N, 1], as `_numbers`."""
    tiles = ()
    for i in gl.static_range(T):
        mask = there[:, None] & (i * W + column < D)[None, :]
        tiles += (gl.load(base + (i * W + column)[None, :], mask=mask, other=0.0),)  # type: ignore[assignment]
    return tiles


@gluon.jit  # type: ignore[untyped-decorator]
def matvec_of_one(  # type: ignore[no-untyped-def]
    x, norm, weight, bias, out, num, eps, D: gl.constexpr, N: gl.constexpr, W: gl.constexpr, T: gl.constexpr,
    WARPS: gl.constexpr, NORMED: gl.constexpr, BIASED: gl.constexpr, ADDED: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """N outputs of a program; W inputs at a time, of which a thread has W / (32 WARPS)."""
    EACH: gl.constexpr = W // (32 * WARPS)
    L: gl.constexpr = gl.BlockedLayout([1, EACH], [1, 32], [1, WARPS], [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    ids, column = gl.program_id(0) * N + gl.arange(0, N, gl.SliceLayout(1, L)), gl.arange(0, W, gl.SliceLayout(0, L))
    tiles = _rows(weight + ids.to(gl.int64)[:, None] * D, ids < num, column, D, W, T)
    norms = ()
    if NORMED:
        norms = _numbers(norm, column, D, W, T)
    own = gl.program_id(0) * N + gl.arange(0, N, gl.SliceLayout(1, ROWS))
    before = gl.zeros([N], gl.float32, gl.SliceLayout(1, ROWS))
    if BIASED:
        before += gl.load(bias + own, mask=own < num, other=0.0)
    after_others(CHAINED)
    if ADDED:
        before += gl.load(out + own, mask=own < num, other=0.0)
    xs = _numbers(x, column, D, W, T)
    sums, square = gl.zeros([N, W], gl.float32, L), gl.zeros([W], gl.float32, gl.SliceLayout(0, L))
    for i in gl.static_range(T):
        number = xs[i].to(gl.float32)
        if NORMED:
            square += number * number
            number *= norms[i]
        sums += tiles[i].to(gl.float32) * number[None, :]
    each = gl.sum(gl.reshape(sums, [N, 32 * WARPS, EACH]), 2)
    total = gl.sum(gl.convert_layout(each, ROWS), 1)
    if NORMED:
        total *= gl.rsqrt(gl.sum(square, 0) / D + eps)
    gl.store(out + own, total + before, mask=own < num)
