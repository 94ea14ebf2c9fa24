"""Which neurons of a layer are active together: joint counts, top partners, the gap, and an order for the disk.

Pure functions on arrays; knows neither layers nor files. The top-average co-activation gap is ReLU² Wins' (arXiv
2402.03804); the order takes the hot neurons out first, since everybody's friend poisons clusters (LLM in a flash, arXiv
2312.11514), then chains neighbours greedily (Ripple, arXiv 2410.19274). Shapes: N tokens, F neurons, P partners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


def joint_counts(active: np.ndarray) -> np.ndarray:
    """How many tokens use both i and j, float32 [F, F], the diagonal being i alone; active bool [N, F]."""
    rows = torch.from_numpy(active).float()
    return np.asarray((rows.T @ rows).numpy())


def top_partners(counts: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Each neuron's `num` most frequent companions, most frequent first: ids int32 [F, P], share of the neuron's own
    tokens at which they are active too, float32 [F, P]. A neuron that was never active has shares of 0."""
    num = min(num, counts.shape[0] - 1)
    others = counts.copy()
    np.fill_diagonal(others, -1.0)
    ids = np.argsort(-others, axis=1, kind="stable")[:, :num]
    share = np.take_along_axis(counts, ids, axis=1) / np.maximum(np.diag(counts), 1.0)[:, None]
    return ids.astype(np.int32), share.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Gap:
    """Means over neurons i. `hot`: what the hottest neurons alone would give as everybody's partners, so that
    top - hot is what co-activation adds to skew."""

    top: float  # mean share of i's tokens at which its top partners are active
    average: float  # the same over all other neurons
    hot: float  # mean frequency of the P most frequent neurons

    @property
    def gap(self) -> float:
        return self.top - self.average


def coactivation_gap(counts: np.ndarray, num_tokens: int, num_partners: int = 10, min_count: int = 10) -> Gap:
    """The top-average gap over neurons active at `min_count` tokens or more (rarer ones have partners by accident)."""
    own = np.diag(counts)
    often = np.flatnonzero(own >= min_count)
    if not often.size:
        return Gap(float("nan"), float("nan"), float("nan"))
    _, share = top_partners(counts, num_partners)
    others = counts[often].sum(axis=1, dtype=np.float64) - own[often]
    average = others / own[often] / (own.size - 1)
    hot = np.sort(own)[::-1][: share.shape[1]] / num_tokens
    return Gap(float(share[often].mean(dtype=np.float64)), float(average.mean()), float(hot.mean()))


def frequency_order(frequency: np.ndarray) -> np.ndarray:
    """Neuron ids, most frequent first, int64 [F]."""
    return np.argsort(-frequency, kind="stable")


def coactivation_order(counts: np.ndarray, num_hot: int) -> np.ndarray:
    """Neuron ids in the order for the disk, int64 [F]: the `num_hot` most frequent by frequency, then a greedy chain in
    which each neuron is followed by the one left that shares most with it (cosine), those never seen together by
    frequency. O(F²)."""
    by_frequency = frequency_order(np.diag(counts))
    hot, cold = by_frequency[:num_hot], by_frequency[num_hot:]
    if not cold.size:
        return hot
    similarity = _cosine(counts[np.ix_(cold, cold)])
    return np.concatenate([hot, cold[_chain(similarity)]])


def disk_order(
    active: np.ndarray, edges: Sequence[int], frequency: np.ndarray | None = None, block: int = 4096
) -> np.ndarray:
    """Neuron ids in the order for the disk, int64 [F], from active sets, bool [N, F]: the hottest first from one of
    `edges` to the next (ascending; those below any edge are the hottest so many, whichever of them is pinned), and
    between two edges chained as `coactivation_order` does, in blocks of like frequency, so that memory does not grow
    with F². frequency [F]: what ranks them, unless it is that of the sets."""
    ranked = frequency_order(active.mean(axis=0) if frequency is None else frequency)
    bounds = sorted({0, *edges, ranked.size})
    parts = [ranked[at : min(at + block, end)] for start, end in pairwise(bounds) for at in range(start, end, block)]
    return np.concatenate([part[_chain(_cosine(joint_counts(active[:, part])))] for part in parts])


def _cosine(counts: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.maximum(np.diag(counts), 1.0))
    return np.asarray(counts / norm[:, None] / norm[None, :])


def _chain(similarity: np.ndarray) -> np.ndarray:
    """Begins at 0; argmax takes the first of equals, so that neurons without a friend follow by their number."""
    size = similarity.shape[0]
    left = np.zeros(size, similarity.dtype)  # -inf once placed
    order = np.empty(size, np.int64)
    current = 0
    for place in range(size):
        order[place] = current
        left[current] = -np.inf
        current = int(np.argmax(similarity[current] + left))
    return order
