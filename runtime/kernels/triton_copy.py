"""Copies scattered records into slots, reading main memory by its registered address. Shapes: N records of W words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # words at once


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source, target, sources, targets, WORDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    first, second = tl.load(sources + i).to(tl.int64) * WORDS, tl.load(targets + i).to(tl.int64) * WORDS
    for start in range(0, WORDS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(target + second + place, tl.load(source + first + place, mask=place < WORDS), mask=place < WORDS)


def copy_records(source: torch.Tensor, target: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """target[targets[i]] = source[sources[i]]; both int32 [*, W], the indices int64 [N]; N at least 1."""
    _copy[(sources.numel(),)](source, target, sources, targets, WORDS=source.shape[1], BLOCK=_BLOCK)
