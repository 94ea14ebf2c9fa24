"""Counters of the cache: plain ints while running, one frozen snapshot when asked, subtractable.

A lookup is one (step, layer, neuron of the union of the batch); a hit was resident when asked. All bytes are the
bytes that crossed the tier border, aligned outward; `needed_bytes` are those of them that were computed with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np


def _subtract(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {k: _subtract(v, b[k]) if k in b else v for k, v in a.items()}
    return a - b


class Subtractable:
    """`later - earlier`, field by field, for frozen dataclasses of numbers, of their like, and of dicts."""

    def __sub__(self, other: Self) -> Self:
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        return replace(self, **{n: _subtract(getattr(self, n), getattr(other, n)) for n in names})  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """Counts per bucket (not cumulative, the last one is +Inf), as Prometheus wants them after a running sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    def __sub__(self, other: HistogramSnapshot) -> HistogramSnapshot:
        counts = tuple(a - b for a, b in zip(self.counts, other.counts, strict=True))
        return HistogramSnapshot(self.bounds, counts, self.sum - other.sum)


class Histogram:
    """A histogram with fixed upper bounds (inclusive). Not locked: one thread writes."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self._edges = np.asarray(self.bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def observe_all(self, values: np.ndarray) -> None:
        """Each of the values [N], at one go."""
        found = np.bincount(np.searchsorted(self._edges, values), minlength=len(self.counts))
        self.counts = [a + b for a, b in zip(self.counts, found.tolist(), strict=True)]
        self.sum += float(values.sum())

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(self.bounds, tuple(self.counts), self.sum)


READ_SIZE_BOUNDS = tuple(float(512 << i) for i in range(15))  # 512 B to 8 MiB


@dataclass(frozen=True, slots=True)
class TierSnapshot(Subtractable):
    """One tier of slots. Capacity and use are levels: a difference of two snapshots holds their change."""

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    insertions: int = 0
    evictions: int = 0
    capacity_bytes: int = 0
    used_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TransferSnapshot(Subtractable):
    """What crossed one border between tiers. `seconds`: from submit to the last byte; `stall_seconds`: waited."""

    bytes: int = 0
    needed_bytes: int = 0
    requests: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheSnapshot(Subtractable):
    """Everything that the cache counts, at one moment. Keys: tier name; (source, destination)."""

    tiers: dict[str, TierSnapshot] = field(default_factory=dict)
    transfers: dict[tuple[str, str], TransferSnapshot] = field(default_factory=dict)
    read_sizes: dict[str, HistogramSnapshot] = field(default_factory=dict)  # by source tier
    prefetch_issued_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0

    @property
    def fastest(self) -> str:
        """The tier that computes: gpu where there is one, else cpu."""
        return "gpu" if "gpu" in self.tiers else "cpu"
