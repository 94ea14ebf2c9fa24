"""Thresholds, layer by layer, from a calibration text: CETT by its exact definition. Knows one layer at a time.

Neuron output n_i(x) = h_i(x) down_i with h_i = act(gate_i x) up_i x. For a set D of dropped neurons
CETT(x) = ||sum over D of n_i(x)|| / ||FFN(x)||, and a layer's figure is the mean over tokens (ReLU² Wins, arXiv
2402.03804; the search over thresholds as in Sparsing Law, arXiv 2411.02335). Two thresholds are found for each target:
`epsilon` on the true magnitudes ||n_i|| (the oracle, what "active" means), and `tau` on the predicted ones, where what
is dropped is what the predictor does not take, so that its misses count. Neurons that are pinned come on top of what
tau takes: raised to the same CETT beside them, it costs perplexity that CETT does not show (benchmarks/LOG.md).
Shapes: N tokens, F neurons, D hidden, C targets.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

CETT_GRID = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
_TOLERANCE = 0.02  # of the target: finer than the sampling error of any affordable calibration text
_MAX_STEPS = 30


@dataclass(frozen=True, slots=True)
class LayerThresholds:
    """For one layer and each CETT target: thresholds and what they keep."""

    epsilon: np.ndarray  # float32 [C]
    tau: np.ndarray  # float32 [C]; 0 takes the whole layer
    active: np.ndarray  # float32 [C], mean share of neurons at or above epsilon
    taken: np.ndarray  # float32 [C], mean share of neurons at or above tau
    frequency: np.ndarray  # float32 [C, F], share of tokens that take a neuron


class LayerTail:
    """CETT of a layer as a function of what is kept, on N tokens. h [N, F], down [F, D], both fp32.

    centred: errors relative to the FFN's output less its mean over the tokens, so that a neuron that is always on, a
    bias in disguise, does not flatter them.
    """

    def __init__(self, h: torch.Tensor, down: torch.Tensor, centred: bool = False) -> None:
        self._h, self._down = h, down
        out = h @ down
        self._norm = (out - out.mean(dim=0) if centred else out).norm(dim=1).clamp_min(1e-20)  # [N]
        self.magnitude = h.abs() * down.norm(dim=1)  # [N, F], ||n_i||

    def cett(self, kept: torch.Tensor) -> float:
        """Mean over tokens of ||sum of what is not kept|| / ||FFN||; kept bool [N, F]."""
        tail = self._h.masked_fill(kept, 0.0) @ self._down
        return float((tail.norm(dim=1) / self._norm).mean())


class Curve:
    """CETT as a monotone function of a threshold, remembering what was evaluated: an evaluation is a matrix product."""

    def __init__(self, cett: Callable[[float], float], low: float, high: float) -> None:
        self._cett = cett
        self._points = sorted({t: cett(t) for t in (low, high)}.items())  # (threshold, cett), ascending

    def threshold(self, target: float) -> float:
        """The largest threshold found with cett <= target, within 2 % of it; 0.0 when even the lowest is above.

        False position on logarithms, where the curve is nearly straight; by halves every third step, lest it crawl.
        """
        if self._points[0][1] > target:
            return 0.0
        for step in range(_MAX_STEPS):
            right = bisect_right(self._points, target, key=lambda p: p[1])
            left, at_left = self._points[right - 1]
            if right == len(self._points) or at_left >= target * (1 - _TOLERANCE):
                return left
            middle = _between(self._points[right - 1], self._points[right], target, halve=step % 3 == 2)
            insort(self._points, (middle, self._cett(middle)))
        return left


def _between(left: tuple[float, float], right: tuple[float, float], target: float, halve: bool) -> float:
    """Where to look next between two points (threshold, cett); a little below the target: it may not be passed."""
    (t0, c0), (t1, c1) = left, right
    share = 0.5
    if not halve and c0 > 0:
        share = (math.log(target * (1 - _TOLERANCE / 2)) - math.log(c0)) / (math.log(c1) - math.log(c0))
    return math.exp(math.log(t0) + min(max(share, 0.02), 0.98) * (math.log(t1) - math.log(t0)))


def calibrate_layer(tail: LayerTail, predicted: torch.Tensor, targets: Sequence[float]) -> LayerThresholds:
    """Thresholds of one layer for ascending CETT targets; predicted: the predictor's magnitudes, fp32 [N, F]."""
    epsilon, tau = thresholds(tail, tail.magnitude, targets), thresholds(tail, predicted, targets)
    frequency = np.stack([_shares(predicted, t) for t in tau])
    return LayerThresholds(
        epsilon=epsilon,
        tau=tau,
        active=np.asarray([_shares(tail.magnitude, e).mean() for e in epsilon], np.float32),
        taken=frequency.mean(axis=1),
        frequency=frequency,
    )


def _shares(magnitude: torch.Tensor, threshold: float) -> np.ndarray:
    """Of the tokens, for each neuron that reaches the threshold in them, float32 [F]."""
    return np.asarray((magnitude >= float(threshold)).float().mean(dim=0).numpy())


def _search_range(magnitude: torch.Tensor) -> tuple[float, float] | None:
    """Thresholds that drop almost nothing and all; None when every magnitude is 0."""
    positive = magnitude[(magnitude > 0) & torch.isfinite(magnitude)]
    if not positive.numel():
        return None
    high = float(positive.max()) * 1.01
    return max(float(positive.min()), high * 1e-9), high  # what is below carries nothing


def thresholds(tail: LayerTail, magnitude: torch.Tensor, targets: Sequence[float]) -> np.ndarray:
    """For each CETT target the largest threshold on `magnitude` [N, F] that drops no more, float32 [C]; 0 drops none.

    magnitude: the true ones (`tail.magnitude`), or a predictor's.
    """
    bounds = _search_range(magnitude)
    if bounds is None:
        return np.zeros(len(targets), np.float32)
    curve = Curve(lambda t: tail.cett(magnitude >= t), *bounds)
    return np.asarray([_as_float32(curve.threshold(target)) for target in targets], np.float32)


def _as_float32(threshold: float) -> float:
    """Rounded down, so that what is compared in fp32 at run time keeps at least what was measured here."""
    value = np.float32(threshold)
    return float(value if value <= threshold else np.nextafter(value, np.float32(0)))
