"""Thresholds, layer by layer, from a calibration text: CETT by its exact definition. Knows one layer at a time.

Neuron output n_i(x) = h_i(x) down_i with h_i = act(gate_i x) up_i x. For a set D of dropped neurons
CETT(x) = ||sum over D of n_i(x)|| / ||FFN(x)||, and a layer's figure is the mean over tokens (ReLU² Wins, arXiv
2402.03804; the search over thresholds as in Sparsing Law, arXiv 2411.02335). Two thresholds are found for each target:
`epsilon` on the true magnitudes ||n_i|| (the oracle, what "active" means), and `tau` on the predicted ones, where what
is dropped is what the predictor does not take, so that its misses count; and again for pinned sets, the first few
neurons, which are always computed: the others then need a higher tau for the same CETT.
Shapes: N tokens, F neurons, D hidden, C targets, S sizes of the pinned set.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

CETT_GRID = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
_STEPS_BETWEEN = 12  # thresholds between the lowest and the highest target's; the rest is interpolation
_TOLERANCE = 0.02  # of the target: finer than the sampling error of any affordable calibration text
_MAX_STEPS = 30


@dataclass(frozen=True, slots=True)
class LayerThresholds:
    """For one layer and each CETT target: thresholds and what they keep."""

    epsilon: np.ndarray  # float32 [C]
    tau: np.ndarray  # float32 [C, S]; 0 takes the whole layer
    active: np.ndarray  # float32 [C], mean share of neurons at or above epsilon
    streamed: np.ndarray  # float32 [C, S], mean share of neurons taken beside the pinned ones
    frequency: np.ndarray  # float32 [C, F], share of tokens that take a neuron, nothing pinned


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

    def cett_beside(self, kept: torch.Tensor, pinned: Sequence[int]) -> np.ndarray:
        """The same when the first `pinned[s]` neurons are kept too, float64 [S], sizes ascending; for one product."""
        h = self._h.masked_fill(kept, 0.0)
        tail = torch.zeros_like(self._down[:1])
        found = []
        for first, stop in reversed(list(pairwise([*pinned, h.shape[1]]))):
            tail = tail + h[:, first:stop] @ self._down[first:stop]
            found.append(float((tail.norm(dim=1) / self._norm).mean()))
        return np.asarray(found[::-1])


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


def calibrate_layer(
    tail: LayerTail, predicted: torch.Tensor, targets: Sequence[float], pinned: Sequence[int] = (0,)
) -> LayerThresholds:
    """Thresholds of one layer for ascending CETT targets; predicted: the predictor's magnitudes, fp32 [N, F].

    pinned: sizes of the pinned set, ascending from 0; it is the first so many neurons.
    """
    epsilon = thresholds(tail, tail.magnitude, targets)
    tau = pinned_thresholds(tail, predicted, targets, pinned)
    active = [float((tail.magnitude >= float(e)).float().mean()) for e in epsilon]
    num = predicted.shape[1]
    streamed = [
        [
            float((predicted[:, p:] >= float(t)).float().mean()) * (num - p) / num
            for t, p in zip(row, pinned, strict=True)
        ]
        for row in tau
    ]
    return LayerThresholds(
        epsilon=epsilon,
        tau=tau,
        active=np.asarray(active, np.float32),
        streamed=np.asarray(streamed, np.float32),
        frequency=np.stack([(predicted >= float(t)).float().mean(dim=0).numpy() for t in tau[:, 0]]),
    )


def pinned_thresholds(
    tail: LayerTail, predicted: torch.Tensor, targets: Sequence[float], pinned: Sequence[int]
) -> np.ndarray:
    """tau for every CETT target and size of the pinned set, float32 [C, S]; 0: even the lowest drops too much.

    All sizes share their evaluations: the two ends by search, thresholds between them evenly on a logarithmic scale,
    then interpolation, for the curves are nearly straight there.
    """
    bounds = _search_range(predicted)
    if bounds is None:
        return np.zeros((len(targets), len(pinned)), np.float32)
    seen: dict[float, np.ndarray] = {}

    def at(threshold: float) -> np.ndarray:
        if threshold not in seen:
            seen[threshold] = tail.cett_beside(predicted >= threshold, pinned)
        return seen[threshold]

    low = Curve(lambda t: float(at(t)[0]), *bounds).threshold(targets[0])
    high = Curve(lambda t: float(at(t)[-1]), *bounds).threshold(targets[-1])
    for threshold in np.geomspace(max(low, bounds[0]), max(high, bounds[0]), _STEPS_BETWEEN):
        at(float(threshold))
    points = sorted(seen)
    cetts = np.maximum.accumulate(np.stack([seen[t] for t in points]), axis=0)  # [P, S]
    return np.asarray([[_interpolated(points, cett, t) for cett in cetts.T] for t in targets], np.float32)


def _interpolated(points: Sequence[float], cetts: np.ndarray, target: float) -> float:
    """The threshold at which a rising curve [P] meets the target; 0.0 when it begins above, its end when below."""
    right = int(np.searchsorted(cetts, target, side="right"))
    if right == 0:
        return 0.0
    if right == len(points) or cetts[right - 1] <= 0:
        return points[right - 1]
    share = math.log(target / cetts[right - 1]) / math.log(cetts[right] / cetts[right - 1])
    return float(points[right - 1] * (points[right] / points[right - 1]) ** share)


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
