"""Tokens a second of the GPU tier before anything has run: bytes by where they lie, over what they are read with.

One sequence, decode. As in `runtime/forecast.py` each layer's most frequent neurons are taken to be resident and a
token to need each neuron by itself with its frequency; reads of the home are taken to overlap with nothing, reads of a
home on disk neither.
Shapes: L layers, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cache.store import BundleFile
from runtime.forecast import ReadTerms, mean_reads

# Small kernels that a layer's step comes to beside its bytes: 0.78 ms of 36 layers, 0.36 dense (benchmarks/LOG.md).
# What reading ahead saves is taken as nothing.
_KERNELS, _KERNELS_DENSE = 25, 12
_VISIT_S = 400e-6  # of a layer, of the host's own work between its two halves (benchmarks/LOG.md)


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """Bytes a second that a kernel reads of scattered records, in GPU memory and in pinned main memory, and what one
    more small kernel of a CUDA graph costs."""

    read_bytes_per_s: float
    zero_copy_bytes_per_s: float
    kernel_s: float


@dataclass(frozen=True, slots=True)
class GpuForecast:
    """Of a token. link_s: reading the absent records from main memory; hit_share: of the needed, those resident; disk_s
    and disk_bytes: of those that are not in main memory either."""

    tokens_per_s: float
    link_s: float
    compute_s: float
    read_bytes: float
    hit_share: float
    disk_s: float = 0.0
    disk_bytes: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DiskTier:
    """A home on disk, and how many records of each layer main memory keeps beside those of the GPU."""

    file: BundleFile
    slots_per_layer: Sequence[int]
    terms: ReadTerms


def gpu_forecast(
    record_bytes: int,
    slots_per_layer: Sequence[int],
    frequency: np.ndarray,
    other_bytes: int,
    machine: GpuMachine,
    dense: bool = False,
    disk: DiskTier | None = None,
) -> GpuForecast:
    """frequency [L, F]: share of tokens that need a neuron, from 1 on always. dense: every token needs all of them, and
    frequency says only which are resident. other_bytes: what a token is multiplied with besides records."""
    needed = np.ones_like(frequency) if dense else np.minimum(frequency, 1.0)
    resident = np.zeros(frequency.shape, bool)
    order = np.argsort(-frequency, axis=1, kind="stable")
    for layer, num_slots in enumerate(slots_per_layer):
        resident[layer, order[layer, :num_slots]] = True
    hits, misses = float(needed[resident].sum()), float(needed[~resident].sum())
    link_s = misses * record_bytes / machine.zero_copy_bytes_per_s
    read_s = (other_bytes + hits * record_bytes) / machine.read_bytes_per_s
    kernels = _KERNELS_DENSE if dense else _KERNELS
    compute_s = read_s + frequency.shape[0] * kernels * machine.kernel_s
    share = hits / max(hits + misses, 1e-9)
    disk_s = disk_bytes = 0.0
    if disk is not None:
        disk_s, disk_bytes = _below(disk, needed, order, slots_per_layer)
        compute_s += frequency.shape[0] * _VISIT_S
    total_s = link_s + compute_s + disk_s
    return GpuForecast(1 / total_s, link_s, compute_s, misses * record_bytes, share, disk_s, disk_bytes)


def _below(
    disk: DiskTier, needed: np.ndarray, order: np.ndarray, slots_per_layer: Sequence[int]
) -> tuple[float, float]:
    """Seconds and bytes of a token that the disk is read for; order [L, F]: neurons, the most frequent first."""
    rng, seconds, read = np.random.default_rng(0), 0.0, 0.0
    for layer, (on_gpu, in_memory) in enumerate(zip(slots_per_layer, disk.slots_per_layer, strict=True)):
        share = needed[layer].copy()
        share[order[layer, : on_gpu + in_memory]] = 0.0
        requests, num_bytes = mean_reads(disk.file, layer, share, disk.terms, rng)
        seconds += disk.terms.cost.seconds(requests, num_bytes, float(num_bytes > 0))
        read += num_bytes
    return seconds, read
