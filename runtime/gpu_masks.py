"""Which neurons of a layer the rows of a step want, asked on the GPU. As `runtime.predictor`.

Shapes: B rows, F neurons, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.kernels.triton_gates import gate_masks
from runtime.kernels.triton_masks import DeviceSketch, Digits, Scoring, Trail, make_digits, plane_masks
from runtime.kernels.triton_matvec import norm_rows


@dataclass(frozen=True, slots=True)
class Norm:
    """The RMS norm in front of an FFN: weight fp32 [D]."""

    weight: torch.Tensor
    eps: float

    def of(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = x normed, fp32 [B, D] both."""
        norm_rows(x, self.weight, self.eps, out)


class Guesses(Protocol):
    """Which neurons of a layer the rows want: of(layer, x fp32 [B, D], norm, h) -> uint8 [B, F], or None: the whole
    layer; the tensor is the caller's until the next call, and h gets x normed. trail: see `plane_masks`; only where
    masks can be `sure`, and layers have a sketch."""

    def of(
        self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None
    ) -> torch.Tensor | None: ...


class Masks(Guesses, Protocol):
    """num_bytes: on the device; num_whole: layers that are always wanted whole. scoring, of x fp32 [1, D]: what it
    takes to say it where the neurons are added up, h and the trail as well; None, and nothing is done: that is no way
    to say it. sure: beside these masks, what up to so many rows want with that margin; None: it has no degrees."""

    name: str
    num_bytes: int
    num_whole: int

    def scoring(
        self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None
    ) -> Scoring | None: ...

    def sure(self, max_rows: int, margin: float) -> Guesses | None: ...


class PlaneMasks:
    """As `runtime.predictor.PlanePredictor`: pinned, or scored at the threshold. sketches: None: all neurons. pinned:
    False where those without a sketch are not asked for."""

    name = "planes"

    def __init__(
        self,
        sketches: Sequence[DeviceSketch | None],
        thresholds: Sequence[float],
        max_rows: int,
        device: torch.device,
        pinned: bool = True,
    ) -> None:
        self._sketches, self._thresholds, self._device = sketches, [float(t) for t in thresholds], device
        known = [s for s in sketches if s is not None]
        num_neurons = known[0].num_neurons if known else 0
        make = torch.ones if pinned else torch.zeros
        self._mask = make(max_rows, num_neurons, dtype=torch.uint8, device=device)  # the pinned ones stay as is
        self._digits = Digits.make(max_rows, max((s.width for s in known), default=0), device)
        self.num_bytes = sum(s.num_bytes for s in known) + self._digits.num_bytes
        self.num_whole = len(sketches) - len(known)

    def sure(self, max_rows: int, margin: float) -> PlaneMasks:
        """Of the same sketches: what scores `margin` times the threshold."""
        return PlaneMasks(self._sketches, [t * margin for t in self._thresholds], max_rows, self._device, pinned=False)

    def of(
        self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None
    ) -> torch.Tensor | None:
        sketch = self._sketches[layer]
        if sketch is None:
            norm.of(x, h)
            return None
        mask = self._mask[: x.shape[0]]
        plane_masks(x, norm.weight, norm.eps, sketch, self._thresholds[layer], self._digits, h, mask, None, trail)
        return mask

    def scoring(
        self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None
    ) -> Scoring | None:
        sketch = self._sketches[layer]
        if sketch is None:
            return None
        make_digits(x, norm.weight, norm.eps, sketch, self._digits, h, bits=True, trail=trail)
        return Scoring(sketch, self._thresholds[layer], self._digits, self._mask[:1])


class GateMasks:
    """As `runtime.predictor.ResidentGatePredictor`. gates: per layer [F, D] on the device."""

    name = "gate"

    def __init__(self, gates: Sequence[torch.Tensor], max_rows: int) -> None:
        self._gates = gates
        self._mask = torch.empty(max_rows, gates[0].shape[0], dtype=torch.uint8, device=gates[0].device)
        self.num_bytes = sum(g.nbytes for g in gates)
        self.num_whole = 0

    def of(self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None) -> torch.Tensor:
        norm.of(x, h)
        mask = self._mask[: x.shape[0]]
        gate_masks(h, self._gates[layer], mask)
        return mask

    def scoring(
        self, layer: int, x: torch.Tensor, norm: Norm, h: torch.Tensor, trail: Trail | None = None
    ) -> Scoring | None:
        return None

    def sure(self, max_rows: int, margin: float) -> None:
        """Zero or not has no degrees."""
