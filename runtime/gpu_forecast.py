"""Tokens a second of the GPU tier before anything has run: bytes by where they lie, over what they are read with.

One sequence, decode. As in `runtime/forecast.py` each layer's most frequent neurons are taken to be resident and a
token to need each neuron by itself with its frequency; reads of the home are taken to overlap with nothing.
Shapes: L layers, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# Small kernels that a layer's step comes to beside its bytes: 1.6 ms of 36 layers, 0.65 dense (benchmarks/LOG.md).
_KERNELS, _KERNELS_DENSE = 44, 18


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """Bytes a second that a kernel reads of scattered records, in GPU memory and in pinned main memory, and what one
    more small kernel of a CUDA graph costs."""

    read_bytes_per_s: float
    zero_copy_bytes_per_s: float
    kernel_s: float


@dataclass(frozen=True, slots=True)
class GpuForecast:
    """Of a token. link_s: reading the absent records from main memory; hit_share: of the needed, those resident."""

    tokens_per_s: float
    link_s: float
    compute_s: float
    read_bytes: float
    hit_share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gpu_forecast(
    record_bytes: int,
    slots_per_layer: Sequence[int],
    frequency: np.ndarray,
    other_bytes: int,
    machine: GpuMachine,
    dense: bool = False,
) -> GpuForecast:
    """frequency [L, F]: share of tokens that need a neuron, from 1 on always. dense: every token needs all of them, and
    frequency says only which are resident. other_bytes: what a token is multiplied with besides records."""
    needed = np.ones_like(frequency) if dense else np.minimum(frequency, 1.0)
    resident = np.zeros(frequency.shape, bool)
    for layer, num_slots in enumerate(slots_per_layer):
        resident[layer, np.argsort(-frequency[layer], kind="stable")[:num_slots]] = True
    hits, misses = float(needed[resident].sum()), float(needed[~resident].sum())
    link_s = misses * record_bytes / machine.zero_copy_bytes_per_s
    read_s = (other_bytes + hits * record_bytes) / machine.read_bytes_per_s
    kernels = _KERNELS_DENSE if dense else _KERNELS
    compute_s = read_s + frequency.shape[0] * kernels * machine.kernel_s
    share = hits / max(hits + misses, 1e-9)
    return GpuForecast(1 / (link_s + compute_s), link_s, compute_s, misses * record_bytes, share)
