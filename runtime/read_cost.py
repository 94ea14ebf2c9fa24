"""What a token's misses cost in reads and bytes, for an order of the bundles on disk and a merge gap.

Knows active sets, places and records; not files. The reads are those that `cache.reader.plan_reads` would make.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.bundle import BundleLayout
from cache.device_curve import ReadCost
from cache.reader import ReadVolume, plan_reads

_HANDLING_BYTE_S = 0.05e-9  # seconds of checking or copying a byte, however it came: 20 GB/s (benchmarks/LOG.md)
_STAGING = 1 << 62  # bytes: nothing is refused here


def reading_seconds(apart: ReadVolume, whole: ReadVolume, layer_bytes: int, cost: ReadCost) -> tuple[float, float]:
    """Seconds of reading the misses of a union of active sets apart, and of streaming the layer and masking it.

    apart: reads of the misses; whole: reads of all that is absent. Streaming handles the bytes of the whole layer, the
    resident ones too. Computing hides behind reads; how much cannot be told, so that it is left out.
    """
    apart_s = cost.seconds(apart.num_requests, apart.num_bytes) + apart.num_bytes * _HANDLING_BYTE_S
    whole_s = cost.seconds(whole.num_requests, whole.num_bytes) + layer_bytes * _HANDLING_BYTE_S
    return apart_s if apart.num_requests else 0.0, whole_s


def read_cost(
    sets: Sequence[np.ndarray], order: np.ndarray, layout: BundleLayout, gaps: Sequence[int], alignment: int
) -> np.ndarray:
    """Mean number of reads and of bytes read a set, float64 [G, 2].

    sets: neuron ids of each step; order: neuron ids as they lie on disk [F]; gaps: neurons that may be read in vain to
    join two reads; alignment in bytes. The layer is taken to begin at an aligned offset.
    """
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size)
    starts = [np.sort(place[ids]) * layout.stride for ids in sets]
    return np.asarray([_mean(starts, layout, gap, alignment) for gap in gaps])


def _mean(starts: Sequence[np.ndarray], layout: BundleLayout, gap: int, alignment: int) -> tuple[float, float]:
    merge = (gap + 1) * layout.stride - layout.record_bytes  # padding between neighbours is no gap
    num_reads = num_bytes = 0
    for begins in starts:
        plan = plan_reads(
            begins,
            layout.record_bytes,
            alignment=alignment,
            merge_gap_bytes=merge,
            staging_offset=0,
            staging_bytes=_STAGING,
        )
        if plan is None:
            raise RuntimeError("a plan without a limit was refused")
        num_reads += plan.offsets.size
        num_bytes += plan.num_bytes
    return num_reads / max(1, len(starts)), num_bytes / max(1, len(starts))
