"""How fast this host computes, found by two short tests. Knows kernels and a clock, not models."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from runtime.forecast import Machine
from runtime.kernels import Kernels

_TEST_S = 0.1


def measure_machine(kernels: Kernels, weight: np.ndarray) -> Machine:
    """Times one row through `weight` [N, D], as `Kernels.linear` takes it and larger than caches are; about 0.2 s."""
    x, out = np.ones((1, weight.shape[1]), np.float32), np.empty((1, weight.shape[0]), np.float32)
    small, gain = torch.ones(1, 512), torch.ones(512)
    seconds = _shortest(lambda: kernels.linear(x, weight, out))
    return Machine(weight.nbytes / seconds, _shortest(lambda: F.rms_norm(small, (512,), gain)))


def _shortest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of many runs: the others tell of who else is at work."""
    run()
    found, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _TEST_S:
        before = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - before)
    return found
