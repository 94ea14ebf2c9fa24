"""Says which neurons of a layer will matter, before the FFN's weights are read. One protocol, several predictors.

A predictor is a function of the layer's input alone; it never learns what is resident.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtime.kernels import Kernels
from runtime.sketches import PlaneSketch

PROVABLE = ("relu", "relu2")  # activations that are exactly zero for half of their inputs


class Predictor(Protocol):
    """predict(layer, x fp32 [B, D]) -> bool [B, F], or None: the whole layer, unasked. The array is reused by the next
    call. num_bytes: all it keeps in memory.

    confidence(layer, x) -> float32 [B, F], reused too: how sure it is, from 1 on of those that `predict` would take; 0
    for pinned ones, who need no guess. None: it knows no degrees, or the layer is computed whole.
    """

    name: str
    num_bytes: int

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray | None: ...

    def confidence(self, layer: int, x: np.ndarray) -> np.ndarray | None: ...


class PlanePredictor:
    """Scores from sketches of gate and up: taken iff pinned, or the predicted output magnitude reaches the threshold.

    sketches: one a layer, without the pinned rows; None: the layer is always computed whole. thresholds [L]: found by
    calibration on predicted scores, so that the CETT of what is *not taken*, misses included, meets the target with
    nothing pinned. The first `num_pinned` neurons of every layer come on top, so that the error can only be less.
    """

    name = "planes"

    def __init__(
        self, sketches: Sequence[PlaneSketch | None], thresholds: np.ndarray, num_pinned: int, kernels: Kernels
    ) -> None:
        self.sketches = sketches
        self.thresholds = thresholds.astype(np.float32)
        self._num_pinned = num_pinned
        self._kernels = kernels
        self._mask, self._scores = np.empty((0, 0), bool), np.empty((0, 0), np.float32)
        self._confidence = np.empty((0, 0), np.float32)
        self.num_bytes = sum(s.num_bytes for s in sketches if s is not None)

    def predict(self, layer: int, x: np.ndarray) -> np.ndarray | None:
        if not self._score(layer, x):
            return None
        np.greater_equal(self._scores, self.thresholds[layer], out=self._mask[:, self._num_pinned :])
        return self._mask

    def confidence(self, layer: int, x: np.ndarray) -> np.ndarray | None:
        """Scores over the threshold; predicted at a guess of the layer's input, for instance."""
        if not self._score(layer, x):
            return None
        np.divide(self._scores, self.thresholds[layer], out=self._confidence[:, self._num_pinned :])
        return self._confidence

    def _score(self, layer: int, x: np.ndarray) -> bool:
        """Scores of all that are not pinned; False where the layer has none."""
        sketch = self.sketches[layer]
        if sketch is None:
            return False
        shape = (x.shape[0], sketch.num_neurons)
        if self._mask.shape != shape:
            self._mask = np.ones(shape, bool)  # the pinned columns stay as they are
            self._scores = np.empty((shape[0], shape[1] - self._num_pinned), np.float32)
            self._confidence = np.zeros(shape, np.float32)  # as above
        self._kernels.plane_scores(x, sketch, self._scores)
        return True


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

    def confidence(self, layer: int, x: np.ndarray) -> None:
        """None: zero or not has no degrees."""
