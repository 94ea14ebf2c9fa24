"""One layer made ready to be packed: order on disk, sketch, thresholds, and whether it is worth being sparse at all.

Everything here is in the packed order, "neuron i" being the i-th record: the FFN's sum does not depend on it. Knows one
layer at a time and the text that it sees; not files, and not the model's likelihoods.
Shapes: N tokens, F neurons, D hidden, C CETT targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cache.bundle import BundleLayout
from cache.device_curve import DEFAULT_MERGE_GAP_BYTES
from runtime.calibrate import LayerTail, LayerThresholds, calibrate_layer, thresholds
from runtime.coactivation import disk_order
from runtime.layers import FFNWeights
from runtime.placement import pinned_sizes
from runtime.read_cost import read_cost
from runtime.sketches import InputStatistics, PlaneSketch, make_plane_sketch
from runtime.streams import Layer, Track

SKETCH_BITS = 1.69  # a weight of gate and up, on average (benchmarks/LOG.md): 6 % of a bf16 FFN's bytes, a fifth pinned
REFERENCE_CACHE = 0.3  # of the FFN's bytes, sketches included: where dense and sparse are compared
_WORTH = 0.75  # of dense's bytes: above, reading in pieces and asking the predictor cost what the bytes save
_ORDER_CETT = 0.05  # at which neurons count as active for the order
_ALIGNMENT = 512  # bytes, of reads
_MERGE_GAP = 2  # neurons read in vain at most, to save a request
_READ_TOKENS = 48  # whose reads are counted


@dataclass(frozen=True, slots=True)
class TunedLayer:
    """`layer` has its FFN in packed order; `order[i]` is the checkpoint's neuron of record i, int64 [F]."""

    layer: Layer
    order: np.ndarray
    sketch: PlaneSketch
    found: LayerThresholds  # tau is 0 at targets where the layer is better read whole
    moved: np.ndarray  # float64 [C], share of the layer's bytes a token reads at REFERENCE_CACHE
    moved_dense: float

    def kept(self, x: torch.Tensor, target: int) -> torch.Tensor | None:
        """What a token computes at a CETT target, nothing pinned: bool [N, F], None for all. x [N, D]."""
        tau = float(self.found.tau[target])
        return None if tau == 0.0 else torch.from_numpy(self.sketch.predict(x.numpy())) >= tau


class Samples:
    """The calibration text on its dense way through the layers: windows for statistics, windows for thresholds."""

    def __init__(self, statistics: torch.Tensor, thresholds: torch.Tensor) -> None:
        """Both embedded, [S, T, D]."""
        self._statistics, self._thresholds = Track(statistics), Track(thresholds)

    def tune(self, layer: Layer, layout: BundleLayout, targets: Sequence[float]) -> TunedLayer:
        """Takes both through the layer, and tunes it on what it saw. Memory: a few times the layer, and [N, F] floats
        of the windows for thresholds."""
        seen = _Seen()
        self._thresholds.step(layer, watch=seen)
        x, h = seen.inputs(), torch.cat(seen.h)
        tail = LayerTail(h, layer.ffn.down)
        epsilon = float(thresholds(tail, tail.magnitude, [_ORDER_CETT])[0])
        sets = _ActiveSets(layer.down_norm, epsilon)
        self._statistics.step(layer, watch=sets)
        order = disk_order(sets.active(), pinned_sizes(h.shape[1]))
        packed = _reordered(layer, order)
        sketch = _sketch(packed, InputStatistics.of(sets.inputs().numpy()))
        return _tuned(packed, order, sketch, x, h[:, torch.from_numpy(order)], layout, targets)


class _Seen:
    """Keeps a layer's inputs and what its neurons made of them."""

    def __init__(self) -> None:
        self.x: list[torch.Tensor] = []
        self.h: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, h: torch.Tensor) -> None:
        self.x.append(x)
        self.h.append(h.clone())

    def inputs(self) -> torch.Tensor:
        return torch.cat(self.x)


class _ActiveSets(_Seen):
    """Keeps the inputs, and who was active."""

    def __init__(self, down_norm: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self._down_norm, self._epsilon = down_norm, epsilon

    def __call__(self, x: torch.Tensor, h: torch.Tensor) -> None:
        magnitude = h.abs() * self._down_norm
        self.x.append(x)
        self.h.append((magnitude >= self._epsilon) & (magnitude > 0))

    def active(self) -> np.ndarray:
        return np.asarray(torch.cat(self.h).numpy())


def _reordered(layer: Layer, order: np.ndarray) -> Layer:
    ids, ffn = torch.from_numpy(order), layer.ffn
    weights = FFNWeights(None if ffn.gate is None else ffn.gate[ids], ffn.up[ids], ffn.down[ids])
    return replace(layer, ffn=weights, down_norm=layer.down_norm[ids])


def _sketch(layer: Layer, statistics: InputStatistics) -> PlaneSketch:
    gate = None if layer.ffn.gate is None else layer.ffn.gate.numpy()
    up, down = layer.ffn.up.numpy(), layer.ffn.down.numpy()
    return make_plane_sketch(layer.config.hidden_act, gate, up, down, statistics, SKETCH_BITS)


def _tuned(
    layer: Layer,
    order: np.ndarray,
    sketch: PlaneSketch,
    x: torch.Tensor,
    h: torch.Tensor,
    layout: BundleLayout,
    targets: Sequence[float],
) -> TunedLayer:
    predicted = torch.from_numpy(sketch.predict(x.numpy()))
    found = calibrate_layer(LayerTail(h, layer.ffn.down), predicted, targets)
    layer_bytes = h.shape[1] * layout.stride
    sketch_share = sketch.num_bytes / layer_bytes
    rows = predicted[torch.linspace(0, predicted.shape[0] - 1, min(_READ_TOKENS, predicted.shape[0])).long()].numpy()
    moved = np.asarray([_moved_share(rows, float(tau), sketch_share, layout) for tau in found.tau])
    dense = 1 - REFERENCE_CACHE
    sparse = np.minimum.accumulate(moved) <= _WORTH * dense  # once worth it, so is every larger target
    tau = np.where(sparse, found.tau, np.float32(0))
    return TunedLayer(layer, order, sketch, replace(found, tau=tau), np.where(sparse, moved, dense), dense)


def _moved_share(predicted: np.ndarray, tau: float, sketch_share: float, layout: BundleLayout) -> float:
    """Share of the layer's bytes that a token reads: beside the sketch the first records, very nearly the hottest,
    are resident, and the others are read above `tau`. predicted [N, F]. Reads are merged and aligned as served."""
    num = predicted.shape[1]
    resident = int(max(0.0, REFERENCE_CACHE - sketch_share) * num)
    if tau == 0.0:
        return 1.0
    missed = [resident + np.flatnonzero(row[resident:] >= tau) for row in predicted]
    gap = min(_MERGE_GAP, DEFAULT_MERGE_GAP_BYTES // layout.stride)
    reads = read_cost([m for m in missed if m.size], np.arange(num), layout, [gap], _ALIGNMENT)[0, 1]
    return float(reads * sum(bool(m.size) for m in missed) / len(missed) / (num * layout.stride))
