"""Which neurons are always computed and how many of each layer stay in memory: pure functions of frequencies.

Neurons are numbered as they lie in a packed model: the hottest tenth first, then the next one, as far as PINNED_SHARES
go. Knows counts and shares; not bytes, not files.
Shapes: L layers, F neurons.
"""

from __future__ import annotations

import numpy as np

PINNED_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)  # of a layer: sizes that its pinned set may have


def pinned_sizes(num_neurons: int) -> tuple[int, ...]:
    """Neurons of a layer that each of PINNED_SHARES pins: the first so many."""
    return tuple(round(share * num_neurons) for share in PINNED_SHARES)


def share_slots(frequency: np.ndarray, num_slots: int) -> np.ndarray:
    """Slots of each layer, int64 [L], `num_slots` in all: they go to the neurons most often needed, wherever they are.

    frequency [L, F]: share of tokens that need a neuron; a layer that is read whole has ones. Equals are shared evenly
    between layers, the first layers getting what is left over.
    """
    num_layers, num_neurons = frequency.shape
    if num_slots >= frequency.size:
        return np.full(num_layers, num_neurons, np.int64)
    ranked = -np.sort(-frequency, axis=1)  # [L, F], each layer's best first
    order = np.argsort(-ranked.T.ravel(), kind="stable")[: max(0, num_slots)]  # of equals: rank by rank, layer by layer
    return np.bincount(order % num_layers, minlength=num_layers)
