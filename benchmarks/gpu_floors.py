"""What a decode step cannot be faster than, and how many misses the reference policy has: arithmetic on counts.

Shapes: L layers, F neurons, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu_results import Figures
from benchmarks.traces import ROW_STEP, Replay
from runtime.replay import frequency

_DECAY = 0.98


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes a second, as measured in the run: records read over the link, records read of GPU memory."""

    zero_copy: float
    read: float

    @classmethod
    def of(cls, ceilings: Figures, record_bytes: int) -> Bandwidths:
        """Of the measured record size that is nearest."""

        def nearest(name: str) -> float:
            measured = {int(size): float(speed) for size, speed in ceilings[name].items()}
            return measured[min(measured, key=lambda size: abs(size - record_bytes))]

        return cls(nearest("zero_copy_bytes_per_s"), nearest("read_bytes_per_s"))


def floor_s(missed_bytes: float, resident_bytes: float, bandwidths: Bandwidths) -> float:
    """Of a step that reads so much over the link and so much of GPU memory, one after the other."""
    return missed_bytes / bandwidths.zero_copy + resident_bytes / bandwidths.read


def steps_of(replay: Replay, layer: int, first: int, num_tokens: int, rows: int = 1) -> list[np.ndarray]:
    """Ids of the union that each step computes, int64 [K] each; row b is ROW_STEP * b tokens further."""
    found = []
    for token in range(first, first + num_tokens):
        union = replay.active(layer, token)
        for row in range(1, rows):
            union = union | replay.active(layer, token + ROW_STEP * row)
        found.append(np.flatnonzero(union))
    return found


def reference_misses(
    replay: Replay, slots_per_layer: Sequence[int], warm_tokens: int, num_tokens: int, rows: int = 1
) -> float:
    """Misses a step of the reference policy (decayed frequency, layer by layer) on the same trace and slots, once it
    has seen `warm_tokens` steps."""
    prior, total = replay.frequency(), 0
    for layer, slots in enumerate(slots_per_layer):
        steps = steps_of(replay, layer, 0, warm_tokens + num_tokens, rows)
        whole = frequency(steps, [slots], prior[layer].astype(np.float64), _DECAY)[0]
        warm = frequency(steps[:warm_tokens], [slots], prior[layer].astype(np.float64), _DECAY)[0] if warm_tokens else 0
        total += sum(s.size for s in steps[warm_tokens:]) - int(whole - warm)
    return total / num_tokens
