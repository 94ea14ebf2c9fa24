"""Reads scattered records and adds their words up: what the bandwidth of a memory is measured with.

The same kernel reads GPU memory and, by their registered addresses, records in main memory. Shapes: N records of W
words, K ids, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # words a program loads at once: 4 KiB


@triton.jit  # type: ignore[untyped-decorator]
def _sum_records(records, ids, out, num_ids, WORDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    while i < num_ids:
        record = tl.load(ids + i).to(tl.int64) * WORDS
        for at in range(0, WORDS, BLOCK):
            place = at + tl.arange(0, BLOCK)
            total += tl.load(records + record + place, mask=place < WORDS, other=0)
        i += tl.num_programs(0)
    tl.store(out + tl.program_id(0), tl.sum(total))


def sum_records(records: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """out int32 [P]: each program's sum, modulo 2^32, of the words of its share of `ids` int32 [K].

    records int32 [N, W], contiguous, on the GPU or pinned in main memory. Inside a CUDA graph too.
    """
    _sum_records[(out.numel(),)](records, ids, out, ids.numel(), records.shape[1], BLOCK=BLOCK)
