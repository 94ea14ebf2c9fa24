"""How good the sparse path is while it serves: a few rows, sampled as they pass, are computed again densely, later.

An audit reads its layer past the cache (it must not change what it judges, nor the cache's counters) and compares the
neurons that were taken with those that are truly active, and the two outputs. Knows rows and layers, not requests.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from cache.bundle import BundleLayout, unpack_vector
from cache.stats import Histogram, HistogramSnapshot, Subtractable
from cache.store import BundleFile
from runtime.kernels.reference import activate

ERROR_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_WAITING = 32  # samples that may wait; more are dropped, and counted


@dataclass(frozen=True, slots=True)
class AuditSnapshot(Subtractable):
    """`tokens`: (row, layer) pairs audited; the others are neurons of those, and pairs that found no place to wait."""

    tokens: int = 0
    true_positive: int = 0  # truly active and taken
    false_negative: int = 0  # truly active and not taken
    dropped: int = 0
    read_bytes: int = 0
    relative_error: HistogramSnapshot = field(
        default_factory=lambda: HistogramSnapshot(ERROR_BOUNDS, (0,) * (len(ERROR_BOUNDS) + 1), 0.0)
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    layer: int
    x: np.ndarray  # float32 [D]
    taken: np.ndarray  # bool [F]


class Auditor:
    """Samples (row, layer) pairs of sparse decode and audits them one at a time.

    rate: share of pairs that are sampled, 0 for none. active_at, float32 [L, F]: what a factor must reach to be
    truly active. Costs: _WAITING rows and masks, and a piece of a layer while an audit runs.
    """

    def __init__(self, file: BundleFile, act: str, active_at: np.ndarray, rate: float, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"the audit rate is {rate}, it must lie in 0..1")
        self._file, self._act, self._active_at, self._rate = file, act, active_at, rate
        self._random = np.random.default_rng(seed)
        self._waiting: deque[_Sample] = deque()
        self._tokens = self._hit = self._missed = self._dropped = self._read_bytes = 0
        self._errors = Histogram(ERROR_BOUNDS)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def offer(self, layer: int, x: np.ndarray, mask: np.ndarray) -> None:
        """Rows x float32 [B, D] of a layer and what was taken for them, bool [B, F]; copies those the dice choose."""
        if not self._rate:
            return
        for row in np.flatnonzero(self._random.random(x.shape[0]) < self._rate):
            if len(self._waiting) >= _WAITING:
                self._dropped += 1
            else:
                self._waiting.append(_Sample(layer, x[row].copy(), mask[row].copy()))

    def run_one(self) -> bool:
        """Audits the oldest sample; False when none waits. Raises ReadError; the sample is then forgotten."""
        if not self._waiting:
            return False
        sample = self._waiting.popleft()
        dense, sparse = np.zeros_like(sample.x), np.zeros_like(sample.x)
        hit = missed = 0
        for start, records in self._file.pieces(sample.layer):
            self._read_bytes += records.nbytes
            part = slice(start, start + records.shape[0])
            factor = _factors(self._file.layout, records, sample.x, self._act)  # [n]
            taken = sample.taken[part]
            active = (factor != 0) & (np.abs(factor) >= self._active_at[sample.layer, part])
            hit += int(np.count_nonzero(active & taken))
            missed += int(np.count_nonzero(active & ~taken))
            down = unpack_vector(self._file.layout, records, "down")  # [n, D]
            dense += factor @ down
            sparse += np.where(taken, factor, np.float32(0)) @ down
        self._tokens, self._hit, self._missed = self._tokens + 1, self._hit + hit, self._missed + missed
        self._errors.observe(float(np.linalg.norm(dense - sparse) / max(float(np.linalg.norm(dense)), 1e-20)))
        return True

    def snapshot(self) -> AuditSnapshot:
        return AuditSnapshot(
            self._tokens, self._hit, self._missed, self._dropped, self._read_bytes, self._errors.snapshot()
        )


def _factors(layout: BundleLayout, records: np.ndarray, x: np.ndarray, act: str) -> np.ndarray:
    """What each neuron multiplies its down vector with, float32 [n]."""
    up = unpack_vector(layout, records, "up") @ x
    if not layout.gated:
        return np.asarray(activate(act, up))
    return np.asarray(activate(act, unpack_vector(layout, records, "gate") @ x) * up)
