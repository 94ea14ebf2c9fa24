"""How kind a layer's active sets are to memory: reuse between tokens, unions over windows, skew.

Pure functions on arrays; knows neither layers nor caches. After the third question of ReLU² Wins (arXiv 2402.03804).
`active` is bool [S, T, F]: S windows of T tokens, each a text of its own, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reuse(active: np.ndarray) -> float:
    """Mean over tokens of |A_t and A_{t-1}| / |A_t|; tokens with an empty set have none. nan when no token has."""
    both = np.count_nonzero(active[:, 1:] & active[:, :-1], axis=2)  # [S, T - 1]
    size = np.count_nonzero(active[:, 1:], axis=2)
    return float((both[size > 0] / size[size > 0]).mean()) if size.any() else float("nan")


def independent_reuse(frequency: np.ndarray) -> float:
    """What reuse would be if every token drew its neurons anew with these shares of tokens [F]."""
    total = float(frequency.sum())
    return float((frequency.astype(np.float64) ** 2).sum() / total) if total else float("nan")


def union_shares(active: np.ndarray, longest: int) -> list[float]:
    """Mean share of a layer's neurons that at least one of 1, 2, .. `longest` neighbouring tokens uses."""
    longest = min(longest, active.shape[1])
    union = active
    shares = [float(union.mean())]
    for width in range(2, longest + 1):
        union = union[:, :-1] | active[:, width - 1 :]
        shares.append(float(union.mean()))
    return shares


def skew(frequency: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Share of all activations that the hottest `shares` of the neurons carry; frequency [F]."""
    hottest = np.sort(frequency.astype(np.float64))[::-1]
    total = hottest.sum()
    return [float(hottest[: round(s * hottest.size)].sum() / total) if total else float("nan") for s in shares]
