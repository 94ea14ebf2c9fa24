"""Tokens a second before anything has run: from how often neurons are needed, the device curve and the machine's speed.

Knows frequencies, records and seconds; not what tokens are. One sequence, decode. The cache is taken to hold each
layer's most frequent neurons (a policy that learns has about 2 % more of the lookups), and a token to need each of the
others by itself with its frequency. What is there is checked and computed with while the rest is read, so that a layer
takes the longer of the two, and the end of the shorter. Shapes: L layers, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cache.device_curve import ReadCost
from cache.reader import volume
from cache.store import BundleFile

_SAMPLES = 16  # tokens drawn for each layer
_CALLS = 350  # small operations of a layer that cost their call and no more
_READ_CALLS = 250  # more of them, where a layer reads
_WARM = 0.1  # of a call's seconds, where what it needs is still in a cache when its layer's turn comes
_CACHE_BYTES = 32e6  # that a layer goes through until nothing is
_REQUEST_S = 1.5e-6  # of the processor's, for each read, while nothing else is done
_NEURON_S = 15e-9  # of masks, look-up and counting, for each neuron there is
_SCATTERED = 0.7  # of the speed at which matrices are read: records lie apart
_CHECK_BYTE_S = 0.2e-9  # of checking or copying a byte that was streamed or read: 5 GB/s
_LAST_PIECE = 1 / 8  # of what is read comes last, when nothing is left to hide behind
_LARGEST_READ = 1 << 20
_GUESSED = 0.4  # of the misses, those that a layer ahead is sure of (benchmarks/LOG.md)
_MOST_GUESSED = 256  # neurons: the reader's queue
_IN_TWO_PARTS = 1.1  # times the reading, for fewer neighbours are read together, and some in vain


@dataclass(frozen=True, slots=True)
class Machine:
    """How fast this host computes: weights through the kernels for one row, and the call of one small operation."""

    bytes_per_s: float
    call_s: float


@dataclass(frozen=True, slots=True)
class ReadTerms:
    """What reading costs, as the cache reads. alignment and merge_gap in bytes."""

    cost: ReadCost
    merge_gap_bytes: int
    alignment: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a token: tokens_per_s and what it is made of. hit_share: of the neurons needed, those that are resident."""

    tokens_per_s: float
    disk_s: float
    compute_s: float
    read_bytes: float
    num_requests: float
    hit_share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    file: BundleFile,
    slots_per_layer: Sequence[int],
    frequency: np.ndarray,
    other_bytes: int,
    streamed_bytes: int,
    terms: ReadTerms,
    machine: Machine,
    dense: bool = False,
    ahead: bool = False,
) -> Forecast:
    """frequency [L, F]: share of tokens that need a neuron, from 1 on always; a layer of ones is streamed. dense: every
    token needs all of them, and frequency says only which are resident. ahead: the surest of the next layer's are read
    while nothing else is, for whatever is not hidden behind reads.

    other_bytes: of all that a token is multiplied with besides records: attention, head, predictor. streamed_bytes: of
    those that are read for each token.
    """
    rng = np.random.default_rng(0)
    num_layers = file.num_layers
    needed = hits = num_requests = 0.0
    read_bytes, disk_s = float(streamed_bytes), streamed_bytes * terms.cost.byte_s
    total_s = disk_s + other_bytes / machine.bytes_per_s
    for layer, num_slots in enumerate(slots_per_layer):
        share = np.ones(file.num_neurons) if dense else np.minimum(frequency[layer], 1.0)
        absent = np.ones(file.num_neurons, bool)
        absent[np.argsort(-frequency[layer], kind="stable")[:num_slots]] = False
        requests, num_bytes = mean_reads(file, layer, np.where(absent, share, 0.0), terms, rng)
        read_s = terms.cost.seconds(requests, num_bytes, float(num_bytes > 0))
        ffn_s = float(share.sum()) * file.layout.record_bytes / (machine.bytes_per_s * _SCATTERED)
        call_s = machine.call_s * coldness(other_bytes / num_layers + float(share.sum()) * file.layout.record_bytes)
        checked = file.layer_bytes if num_bytes and share.min() >= 1.0 else num_bytes  # streamed: what stays is copied
        busy_s = ffn_s + checked * _CHECK_BYTE_S
        apart_s = file.num_neurons * _NEURON_S + requests * _REQUEST_S
        apart_s += (_CALLS + (_READ_CALLS if num_bytes else 0)) * call_s
        missed = float(share[absent].sum())
        if ahead and layer and missed and share.min() < 1.0:
            read_s *= _IN_TWO_PARTS
            hidden_s = min(_GUESSED, _MOST_GUESSED / missed) * read_s
            read_s -= min(hidden_s, apart_s + other_bytes / num_layers / machine.bytes_per_s)
        total_s += max(read_s, busy_s) + min(read_s, busy_s) * _LAST_PIECE + apart_s
        needed, hits = needed + float(share.sum()), hits + float(share[~absent].sum())
        read_bytes, num_requests, disk_s = read_bytes + num_bytes, num_requests + requests, disk_s + read_s
    return Forecast(1 / total_s, disk_s, total_s - disk_s, read_bytes, num_requests, hits / max(needed, 1e-9))


def coldness(layer_bytes: float) -> float:
    """Of a call's full seconds, what it takes where a layer goes through so many bytes: code and small arrays that the
    weights have driven out of the caches come from memory again."""
    return _WARM + (1 - _WARM) * min(1.0, layer_bytes / _CACHE_BYTES)


def mean_reads(
    file: BundleFile, layer: int, share: np.ndarray, terms: ReadTerms, rng: np.random.Generator
) -> tuple[float, float]:
    """Mean requests and bytes of tokens that need each neuron with probability `share` [F]."""
    found = np.zeros(2)
    for _ in range(_SAMPLES):
        ids = np.flatnonzero(rng.random(share.size) < share)
        v = volume(file.starts(layer, ids), file.layout.record_bytes, terms.alignment, terms.merge_gap_bytes)
        found += max(v.num_requests, v.num_bytes / _LARGEST_READ), v.num_bytes
    requests, num_bytes = found / _SAMPLES
    return float(requests), float(num_bytes)
