"""Which layers a sparse step will probably stream, from what the step before did, and the time that reads gain by it.

Knows layers and seconds; not why a layer was streamed. Nothing but time depends on it.
"""

from __future__ import annotations

import time

_KEPT = 0.9  # of the mean, at each new measurement


class Streak:
    """`streamed[layer]`: whether the last sparse step streamed it. Means, in seconds: `between_s`, from the end of one
    FFN to where the next layer's set is known, of attention and the predictor: so long can a disk read ahead;
    `computing_s`, of a layer's FFN, without what it waited for."""

    def __init__(self, num_layers: int) -> None:
        self.streamed = [False] * num_layers
        self.between_s = self.computing_s = 0.0
        self._left: tuple[int, float] | None = None  # layer and time

    def asked(self, layer: int) -> None:
        """The layer's set is known. Steps are apart by more than layers are, and are not measured."""
        if self._left is not None and self._left[0] == layer - 1:
            self.between_s = _mean(self.between_s, time.perf_counter() - self._left[1])

    def left(self, layer: int, computing_s: float) -> None:
        """The layer's FFN is done."""
        self._left = (layer, time.perf_counter())
        self.computing_s = _mean(self.computing_s, computing_s)


def _mean(mean_s: float, new_s: float) -> float:
    return _KEPT * mean_s + (1 - _KEPT) * new_s if mean_s else new_s
