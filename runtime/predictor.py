"""Says which neurons of a layer will matter, before the FFN's weights are read. One protocol, several predictors.

A predictor is a function of the layer's input alone; it never learns what is resident.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtime.kernels import Kernels
from runtime.kernels.sketch import Sketch

PROVABLE = ("relu", "relu2")  # activations that are exactly zero for half of their inputs


class Predictor(Protocol):
    """predict(layer, x fp32 [B, D]) -> bool [B, F]; the array is reused by the next call."""

    name: str
    num_bytes: int

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray: ...


class SketchPredictor:
    """Scores from 4-bit copies of gate and up: taken iff the predicted output magnitude reaches the threshold.

    thresholds: one a layer, found by calibration on predicted scores, so that the CETT of what is *not taken*,
    predictor errors included, meets the target. A threshold of 0 takes the whole layer.
    Cost: 4 bits a weight of gate and up, and three fp32 a neuron.
    """

    name = "sketch4"

    def __init__(self, sketches: Sequence[Sketch], thresholds: np.ndarray, act: str, kernels: Kernels) -> None:
        self._sketches = sketches
        self._thresholds = thresholds.astype(np.float32)
        self._act = act
        self._kernels = kernels
        self._scores = np.empty((0, 0), np.float32)
        self.num_bytes = sum(s.num_bytes for s in sketches)

    @property
    def down_norms(self) -> np.ndarray:
        """||down_i|| of every neuron, float32 [L, F]."""
        return np.stack([s.down_norm for s in self._sketches])

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray:
        sketch = self._sketches[layer]
        shape = (x.shape[0], sketch.up_scale.shape[0])
        if self._scores.shape != shape:
            self._scores = np.empty(shape, np.float32)
        self._kernels.sketch_scores(x, sketch, self._act, self._scores)
        return np.asarray(self._scores >= self._thresholds[layer])


class ResidentGatePredictor:
    """Exact: the gate (up, where there is none) is resident as it is, and what it makes zero is provably zero.

    For ReLU-family activations only. gates: per layer [F, D], fp32, fp16, or bf16 as uint16.
    """

    name = "gate"

    def __init__(self, gates: Sequence[np.ndarray], kernels: Kernels) -> None:
        self._gates = gates
        self._kernels = kernels
        self.num_bytes = sum(g.nbytes for g in gates)

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray:
        gate = self._gates[layer]
        pre = np.empty((x.shape[0], gate.shape[0]), np.float32)
        for start in range(0, x.shape[0], 16):  # the kernel's limit of rows
            self._kernels.linear(x[start : start + 16], gate, pre[start : start + 16])
        return pre > 0
