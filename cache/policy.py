"""Who stays in the slots: eviction and admission as functions of arrays. Knows scores, not bytes and not slots.

Layers are visited in a cycle, so recency alone gets nothing once a cache is smaller than one token's active set;
frequency with decay is a little better than any recency at every size (LLM in a flash's window is its special case).
"""

from __future__ import annotations

import numpy as np

DECAY = 0.95  # a use twenty steps ago counts a third: better than 0.98 and than recency (benchmarks/LOG.md)
_RESCALE_AT = 1e12  # increments grow by 1/decay a step; fold them back long before float64 runs out of digits


class DecayedFrequency:
    """Score of a neuron: how often it was used, a use k steps ago counting decay^k.

    Touching is O(touched): instead of decaying all scores, the weight of a new use grows. The prior is the share of
    tokens [L, F] that used a neuron in the profile; it enters as the score which that share would have in the long run.
    """

    def __init__(self, prior: np.ndarray, decay: float = DECAY) -> None:
        self._decay = decay
        self._scores = prior.astype(np.float64) / (1.0 - decay)  # [L, F]
        self._increment = np.ones(prior.shape[0])  # [L]

    def pin(self, layer: int, ids: np.ndarray) -> None:
        """Nothing outranks these neurons any more."""
        self._scores[layer, ids] = np.inf

    def touch(self, layer: int, ids: np.ndarray) -> None:
        """One step of `layer` used neurons `ids` (unique)."""
        increment = self._increment[layer] / self._decay
        if increment > _RESCALE_AT:
            self._scores[layer] /= increment
            increment = 1.0
        self._increment[layer] = increment
        self._scores[layer, ids] += increment

    def scores(self, layer: int) -> np.ndarray:
        """Scores of a layer's neurons, float64 [F], comparable within the layer; a view, do not change it."""
        view: np.ndarray = self._scores[layer]
        return view


def choose_swaps(candidates: np.ndarray, residents: np.ndarray, free: int) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates to admit and which residents make room for them.

    candidates: scores of what was just read [M]; residents: scores of what may be evicted [R]; free: empty places.
    Returns (indices into candidates, best first [A]; indices into residents [max(0, A - free)]). The best candidate
    takes an empty place, or that of the worst resident if it scores strictly higher (equal scores do not move bytes).
    """
    order = np.argsort(-candidates, kind="stable")
    into_free = order[:free]
    rest = order[free : free + residents.size]
    if not rest.size:
        return into_free, np.empty(0, np.int64)
    worst = np.argpartition(residents, rest.size - 1)[: rest.size]
    worst = worst[np.argsort(residents[worst], kind="stable")]
    num = int(np.count_nonzero(candidates[rest] > residents[worst]))  # one falls, the other rises: a prefix
    return np.concatenate([into_free, rest[:num]]), worst[:num]
