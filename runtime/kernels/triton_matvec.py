"""Few rows times a matrix that is read once: a decode step's projections, with the norm before and the sum behind.

A program's part of the matrix is under way before the kernels in front of it are done. Shapes: B rows (a power of two,
at most MOST_ROWS), M outputs, D inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.triton_launch import after_others, chained, laid_out

MOST_ROWS = 4  # more are faster as a matrix product
_TILES = (1024, 512, 256)  # inputs at once
_OUTPUTS, _FETCHED, _WARPS, _WIDE = 16, 98304, 8, 512  # of a program for one row; bytes of the matrix it has under way


@triton.jit  # type: ignore[untyped-decorator]
def _matvec(  # type: ignore[no-untyped-def]
    x, norm, weight, bias, out, num, eps, D: tl.constexpr, B: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    T: tl.constexpr, NORMED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    ids, row = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, B)
    there = ids < num
    base = weight + ids.to(tl.int64)[:, None] * D
    tiles = ()
    for i in tl.static_range(T):
        column = i * W + tl.arange(0, W)
        tiles += (tl.load(base + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0),)  # type: ignore[assignment]
    after_others(CHAINED)
    at, before = out + row[None, :] * num + ids[:, None], tl.zeros([N, B], tl.float32)
    if ADDED:
        before += tl.load(at, mask=there[:, None], other=0.0)
    if BIASED:
        before += tl.load(bias + ids, mask=there, other=0.0)[:, None]
    if B == 1:  # one row needs no dimension of its own
        sums1, square1 = tl.zeros([N, W], tl.float32), tl.zeros([W], tl.float32)
        for i in tl.static_range(T):
            column = i * W + tl.arange(0, W)
            inside = column < D
            xs1 = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            if NORMED:
                square1 += xs1 * xs1
                xs1 *= tl.load(norm + column, mask=inside, other=0.0)
            sums1 += tiles[i].to(tl.float32) * xs1[None, :]
        total = tl.sum(sums1, 1)[:, None]
        if NORMED:
            total *= tl.rsqrt(tl.sum(square1, 0) / D + eps)
    else:
        sums, square = tl.zeros([N, B, W], tl.float32), tl.zeros([B, W], tl.float32)
        for i in tl.static_range(T):
            column = i * W + tl.arange(0, W)
            inside = column < D
            xs = tl.load(x + row[:, None] * D + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            if NORMED:
                square += xs * xs
                xs *= tl.load(norm + column, mask=inside, other=0.0)[None, :]
            sums += tiles[i].to(tl.float32)[:, None, :] * xs[None, :, :]
        total = tl.sum(sums, 2)  # [N, B]
        if NORMED:
            total *= tl.rsqrt(tl.sum(square, 1) / D + eps)[None, :]
    tl.store(at, total + before, mask=there[:, None])


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    added: bool = False,
) -> None:
    """out fp32 [B, M] = x [B, D] times weight [M, D] transposed, plus bias fp32 [M], plus what out holds when `added`.

    norm fp32 [D]: of an RMS norm that x passes through first. Nothing is rounded between: sums are fp32.
    """
    (num, hidden), rows = weight.shape, x.shape[0]
    if rows == 1 and laid_out(x):
        _matvec_of_one(x, weight, out, norm, eps, bias, added)
        return
    wide = min(_TILES, key=lambda w: (triton.cdiv(hidden, w) * w, -w))
    together = max(1, 4 // rows)
    _matvec[(triton.cdiv(num, together),)](
        x, x if norm is None else norm, weight, x if bias is None else bias, out, num, eps, D=hidden, B=rows,
        N=together, W=wide, T=triton.cdiv(hidden, wide), NORMED=norm is not None, BIASED=bias is not None, ADDED=added,
        **chained(x),
    )  # fmt: skip


def _matvec_of_one(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    added: bool,
) -> None:
    """As `matvec`."""
    from runtime.kernels.gluon_matvec import matvec_of_one

    (num, hidden), together = weight.shape, _OUTPUTS
    while together > 1 and together * hidden * weight.element_size() > _FETCHED:
        together //= 2
    matvec_of_one[(triton.cdiv(num, together),)](
        x, x if norm is None else norm, weight, x if bias is None else bias, out, num, eps, D=hidden, N=together,
        W=_WIDE, T=triton.cdiv(hidden, _WIDE), WARPS=_WARPS, NORMED=norm is not None, BIASED=bias is not None,
        ADDED=added, num_warps=_WARPS, **chained(x, early=True),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _norm(x, weight, out, eps, D: tl.constexpr, W: tl.constexpr, CHAINED: tl.constexpr):  # type: ignore[no-untyped-def]
    after_others(CHAINED)
    column = tl.arange(0, W)
    inside, row = column < D, tl.program_id(0) * D
    xs = tl.load(x + row + column, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(xs * xs, 0) / D + eps)
    tl.store(out + row + column, xs * scale * tl.load(weight + column, mask=inside, other=0.0), mask=inside)


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / rms(x) * weight, row by row; x, out fp32 [B, D], weight fp32 [D]."""
    rows, hidden = x.shape
    wide = triton.next_power_of_2(hidden)
    _norm[(rows,)](x, weight, out, eps, D=hidden, W=wide, num_warps=8, **chained(x))
