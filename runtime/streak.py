"""Which layers a sparse step will probably stream, from what the step before did, and the time that reads gain by it.

Knows layers and seconds; not why a layer was streamed. Nothing but time depends on it.
"""

from __future__ import annotations

import time

_KEPT = 0.9  # of the mean, at each new measurement


class Streak:
    """`streamed[layer]`: whether the last sparse step streamed it. `between_s`: mean seconds from the end of one FFN to
    where the next layer's set is known, of attention and the predictor: so long can a disk read ahead."""

    def __init__(self, num_layers: int) -> None:
        self.streamed = [False] * num_layers
        self.between_s = 0.0
        self._left: tuple[int, float] | None = None  # layer and time

    def asked(self, layer: int) -> None:
        """The layer's set is known. Steps are apart by more than layers are, and are not measured."""
        if self._left is not None and self._left[0] == layer - 1:
            took_s = time.perf_counter() - self._left[1]
            self.between_s = _KEPT * self.between_s + (1 - _KEPT) * took_s if self.between_s else took_s

    def left(self, layer: int) -> None:
        """The layer's FFN is done."""
        self._left = (layer, time.perf_counter())
