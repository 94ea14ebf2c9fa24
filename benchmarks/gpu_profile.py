"""Where a decode step's time goes, kernel by kernel: what the GPU's own clock says of the kernels of replayed graphs.

Kernels that begin before the ones in front of them end (runtime/kernels/triton_launch.py) wait inside their own time,
so that a kernel's share is told from a step in which none does; how long a step takes either way stands beside it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_decode import Traced
from benchmarks.gpu_results import Figures
from runtime.kernels import triton_launch

WARM_STEPS, STEPS = 20, 4


def measure_profile(make: Callable[[], Traced]) -> Figures:
    """make(): a model of its own, captured anew. Microseconds a step; the ranking of the hot set is left out where a
    step's are medians."""
    together = make()
    together.decode(WARM_STEPS)
    chained_s = statistics.median(together.decode(2 * STEPS))
    del together
    torch.cuda.empty_cache()
    triton_launch.OFF = True
    try:
        apart = make()
    finally:
        triton_launch.OFF = False
    apart.decode(WARM_STEPS)
    apart_s = statistics.median(apart.decode(2 * STEPS))
    kernels = by_kernel(lambda: apart.decode(STEPS))
    return {"step_us": chained_s * 1e6, "step_apart_us": apart_s * 1e6, "kernels": kernels}


def by_kernel(run: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Of STEPS steps: calls and microseconds a step, by kernel, the largest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    calls: dict[str, int] = defaultdict(int)
    time_us: dict[str, float] = defaultdict(float)
    for event in seen.events():
        calls[event.name[:60]] += 1
        time_us[event.name[:60]] += event.device_time_total
    names = sorted(time_us, key=lambda name: -time_us[name])
    return {n: {"calls": calls[n] / STEPS, "us": round(time_us[n] / STEPS, 1)} for n in names if time_us[n] > 0}
