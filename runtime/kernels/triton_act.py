"""Activations inside Triton kernels, by the numbers that the kernels are compiled with."""

from __future__ import annotations

import triton
import triton.language as tl

ACTS = {"silu": 0, "relu": 1, "relu2": 2}


@triton.jit  # type: ignore[untyped-decorator]
def activated(z, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z), one of ACTS."""
    if ACT == 0:
        a = z / (1 + tl.exp(-z))
    else:
        a = tl.maximum(z, 0.0)
        if ACT == 2:
            a = a * a
    return a
