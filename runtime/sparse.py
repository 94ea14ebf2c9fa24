"""What mode sparse takes from a packed model at a CETT: predictor, pinned set, thresholds, and who is needed how often.

Knows the profile's arrays and the sketches' file; not how they came about, and not what is resident.
Shapes: L layers, F neurons, C calibrated targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cache.errors import ColdstreamError, FormatError, FormatKind
from runtime.kernels import Kernels
from runtime.packed import SKETCH, Packed
from runtime.placement import pinned_sizes
from runtime.predictor import PlanePredictor
from runtime.sketches import PlaneSketch

_ALWAYS = 2.0  # more often than always: pinned neurons come first when slots are shared out


@dataclass(frozen=True, slots=True)
class Needs:
    """What the profile alone says. frequency [L, F]: share of tokens that need a neuron; a layer that is read whole has
    ones. active_at [L, F]: what a neuron's factor must reach to count as active. pinned: of each layer the first so
    many. tau [L]: thresholds on what is predicted, 0 for a layer that is read whole."""

    frequency: np.ndarray
    active_at: np.ndarray
    pinned: tuple[int, ...]
    tau: np.ndarray


@dataclass(frozen=True, slots=True)
class Sparse(Needs):
    """What mode sparse serves with."""

    predictor: PlanePredictor


def sparse_setup(
    packed: Packed, profile: Mapping[str, np.ndarray], cett: float, num_pinned: int, kernels: Kernels
) -> Sparse:
    """As `sparse_needs`, with the predictor: reads the sketches."""
    needs = sparse_needs(packed, profile, cett, num_pinned)
    sketches = _sketches(packed, np.asarray(needs.tau > 0), num_pinned)
    predictor = PlanePredictor(sketches, needs.tau, num_pinned, kernels)
    return Sparse(needs.frequency, needs.active_at, needs.pinned, needs.tau, predictor)


def sparse_needs(packed: Packed, profile: Mapping[str, np.ndarray], cett: float, num_pinned: int) -> Needs:
    """num_pinned: of every sparse layer, one of `pinned_sizes`. Raises ColdstreamError for a CETT that was not
    calibrated, FormatError."""
    targets = profile["targets"]
    if num_pinned not in pinned_sizes(packed.config.intermediate_size):
        raise ValueError(f"{num_pinned} pinned neurons: not one of `pinned_sizes`")
    tau = interpolate(targets, profile["tau"], cett)  # what the contract was measured with: see LOG.md
    sparse = np.asarray(packed.sparse_layers(cett)) & (tau > 0)
    tau = np.where(sparse, tau, np.float32(0))
    pinned = tuple(num_pinned if s else 0 for s in sparse)
    nearest = int(np.abs(np.log(targets / cett)).argmin())
    frequency = np.where(sparse[:, None], profile["frequency"][nearest], np.float32(1))
    for layer, num in enumerate(pinned):
        frequency[layer, :num] = _ALWAYS
    epsilon = interpolate(targets, profile["epsilon"], cett)
    active_at = np.asarray(epsilon[:, None] / np.maximum(profile["down_norm"], 1e-30), np.float32)
    return Needs(frequency, active_at, pinned, tau)


def _sketches(packed: Packed, sparse: np.ndarray, num_pinned: int) -> list[PlaneSketch | None]:
    """Without the rows of pinned neurons; None for a layer that is read whole. One layer's are in memory twice."""
    num, act = packed.config.intermediate_size, packed.config.hidden_act
    pinned, found = np.arange(num) < num_pinned, list[PlaneSketch | None]()
    for i, arrays in enumerate(packed.read_layers(SKETCH, sparse.tolist())):
        if arrays is None:
            found.append(None)
            continue
        try:
            sketch = PlaneSketch.from_arrays(arrays, f"layers.{i}.", act, num)
        except ValueError as error:
            raise FormatError(FormatKind.BAD_SHAPE, f"{packed.path / SKETCH}: {error}") from error
        found.append(sketch.without(pinned) if num_pinned else sketch)
    return found


def interpolate(targets: np.ndarray, thresholds: np.ndarray, cett: float) -> np.ndarray:
    """Thresholds [L] for a CETT between two calibrated targets, on logarithms; thresholds [L, C].

    A layer that is whole at the lower target stays whole. Raises ColdstreamError outside of the calibrated range.
    """
    check_cett(targets, cett)
    right = int(np.searchsorted(targets, cett))
    if targets[right] == cett:
        return np.asarray(thresholds[:, right])
    share = np.log(cett / targets[right - 1]) / np.log(targets[right] / targets[right - 1])
    low, high = thresholds[:, right - 1].astype(np.float64), thresholds[:, right].astype(np.float64)
    mixed = np.exp((1 - share) * np.log(np.maximum(low, 1e-38)) + share * np.log(np.maximum(high, 1e-38)))
    return np.where(low > 0, mixed, 0.0).astype(np.float32)


def check_cett(targets: np.ndarray, cett: float) -> None:
    """ColdstreamError for a CETT outside of the calibrated range."""
    if not targets[0] <= cett <= targets[-1]:
        raise ColdstreamError(f"--cett {cett:g}: this model was prepared for {targets[0]:g} to {targets[-1]:g}")
