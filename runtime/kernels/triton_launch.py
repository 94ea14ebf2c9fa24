"""Kernels that begin while the one before them ends: programmatic dependent launch, where the GPU has it (9.0 and up).

A kernel that is launched so waits, once it has fetched what nobody writes, for all that came before it. Every kernel of
a step does so right at its start, so that a kernel may rely on all before it, not only on the last one. Some let the
next one come before they wait themselves: several in a row may be there at once, and what one of them fetches before
its wait must not have been written by any kernel of the step, but the one that takes its inputs: nothing comes before
that one has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_CAPABILITY = 9
ASSUMED = 0  # a GPU of this capability, though tensors are elsewhere: for compiling without one
BITS = True  # products of bits where the GPU is quick at them; off for holding the other way against them
LAID_OUT = True  # kernels with layouts of their own where they were measured; off for holding the others against them
OFF = False  # one kernel after the other: for telling their times apart


@triton.jit  # type: ignore[untyped-decorator]
def after_others(CHAINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What kernels before this one wrote may be read from here on; the next one may come and wait, or could so far."""
    if CHAINED == 2:
        gdc_launch_dependents()
        gdc_wait()
    elif CHAINED == 1:
        gdc_wait()
        gdc_launch_dependents()


@contextmanager
def apart() -> Iterator[None]:
    """Kernels launched meanwhile neither begin early nor let others: beside another stream's they must be so."""
    global OFF
    before, OFF = OFF, True
    try:
        yield
    finally:
        OFF = before


def compiled() -> bool:
    """Whether kernels are compiled, and not interpreted, which knows no assembler."""
    return not triton.knobs.runtime.interpret


def chained(x: torch.Tensor, early: bool = False) -> dict[str, Any]:
    """Keyword arguments of a launch on the device of x. early: the next kernel may come before this one's wait is
    over."""
    if not OFF and _capability(x) >= _CAPABILITY:
        return {"CHAINED": 2 if early else 1, "launch_pdl": True}
    return {"CHAINED": 0}


def by_bits(x: torch.Tensor) -> bool:
    """Whether bits are multiplied on the device of x: measured on compute capability 9 alone."""
    return BITS and _measured(x)


def laid_out(x: torch.Tensor) -> bool:
    """Whether kernels that say themselves which thread has what run on the device of x: as `by_bits`."""
    return LAID_OUT and _measured(x)


def _measured(x: torch.Tensor) -> bool:
    return compiled() and _capability(x) == _CAPABILITY


def _capability(x: torch.Tensor) -> int:
    """Major number of the device of x; 0 for a CPU."""
    return ASSUMED or (_device_capability(x.device) if x.is_cuda else 0)


@cache
def _device_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
