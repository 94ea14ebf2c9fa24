"""What a step is given, as its kernels take it: read where the host has written it, in one kernel.

Shapes: B rows, P blocks of a table, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FIELDS = 4  # of a row, before its table


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(  # type: ignore[no-untyped-def]
    given, embedding, fields, tables, x, width, FIELDS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row. No kernel comes before this one is done: those after it read fields and tables before they wait."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    own, block, column = given + row * (FIELDS + width), tl.arange(0, BLOCKS), tl.arange(0, WIDE)
    token = tl.load(own)
    kinds = tl.arange(0, FIELDS)
    tl.store(fields + kinds * rows + row, tl.load(own + kinds))
    tl.store(tables + row * width + block, tl.load(own + FIELDS + block, mask=block < width), mask=block < width)
    inside = column < D
    tl.store(x + row * D + column, tl.load(embedding + token * D + column, mask=inside).to(tl.float32), mask=inside)


def inputs(
    given: torch.Tensor, embedding: torch.Tensor, fields: torch.Tensor, tables: torch.Tensor, x: torch.Tensor
) -> None:
    """Of given int64 [B, FIELDS + P] (a row's token first; in main memory it is pinned): fields int64 [FIELDS, B],
    tables int64 [B, P], and x fp32 [B, D], the tokens' rows of embedding [V, D]."""
    (rows, width), hidden = tables.shape, x.shape[1]
    _inputs[(rows,)](
        given, embedding, fields, tables, x, width, FIELDS=FIELDS, D=hidden, WIDE=triton.next_power_of_2(hidden),
        BLOCKS=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
