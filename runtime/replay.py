"""Hit rates of a neuron cache on recorded active sets, under several policies. Knows ids and capacities, not bytes.

A trace is a sequence of steps, each an array of unique ids below `num_ids`: one layer's active sets token by token, or
all layers' in the order in which they are visited, ids made unique by the layer, for one pool over all of them. Every
step's misses land in a staging area beside the cache, and only then the policy decides what stays: any of what was
there and of what the step used. All caches begin full, with what was hottest on another text (Belady: with its own
choice). Hits of all capacities come from one run, since each policy keeps the `capacity` best of one ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cache.policy import DECAY, DecayedFrequency

Steps = Sequence[np.ndarray]
POLICIES = ("static", "lru", "lfu", "ours", "belady")
_LFU_DECAY = 0.98  # of the plain one that is shown beside ours


def hit_rates(steps: Steps, num_ids: int, capacities: Sequence[int], prior: np.ndarray) -> dict[str, list[float]]:
    """Share of the trace's uses that each policy has in the cache, one figure a capacity.

    prior: share of steps that used an id on another text, [num_ids]. lfu: decayed frequency that begins with no
    knowledge but the initial contents; ours: `cache.policy.DecayedFrequency`, which begins with the prior.
    """
    found = {
        "static": static(steps, capacities, prior),
        "lru": recency(steps, capacities, prior),
        "lfu": frequency(steps, capacities, prior * 1e-6, _LFU_DECAY),
        "ours": frequency(steps, capacities, prior, DECAY),
        "belady": np.asarray([belady(steps, num_ids, c) for c in capacities]),
    }
    total = max(1, sum(s.size for s in steps))
    return {name: [float(h) / total for h in hits] for name, hits in found.items()}


def pooled(layers: Sequence[Steps], num_neurons: int) -> list[np.ndarray]:
    """The steps of one pool over all layers: token by token, layer by layer."""
    return [ids + layer * num_neurons for token in zip(*layers, strict=True) for layer, ids in enumerate(token)]


def pool_hit_rates(
    layers: Sequence[Steps], num_neurons: int, capacities: Sequence[int], priors: np.ndarray
) -> dict[str, list[float]]:
    """hit_rates of one pool; priors [L, F] as for a layer. A token decays counts as much as in a cache of one layer."""
    steps, num_layers = pooled(layers, num_neurons), len(layers)
    flat = priors.reshape(-1)
    decay, lfu_decay = (d ** (1 / num_layers) for d in (DECAY, _LFU_DECAY))  # a step: one for every layer of a token
    found = {
        "static": static(steps, capacities, flat),
        "lru": recency(steps, capacities, flat),
        "lfu": frequency(steps, capacities, flat * 1e-6, lfu_decay),
        "ours": frequency(steps, capacities, flat / num_layers, decay),
        "belady": np.asarray([belady(steps, flat.size, c) for c in capacities]),
    }
    total = max(1, sum(s.size for s in steps))
    return {name: [float(h) / total for h in hits] for name, hits in found.items()}


def static(steps: Steps, capacities: Sequence[int], prior: np.ndarray) -> np.ndarray:
    """Hits of the ids that were hottest before, never changed; int64 [C]."""
    rank = np.empty(prior.size, np.int64)
    rank[np.argsort(-prior, kind="stable")] = np.arange(prior.size)
    uses = np.bincount(np.concatenate([rank[s] for s in steps]), minlength=prior.size)
    return np.concatenate([[0], np.cumsum(uses)])[list(capacities)]


def recency(steps: Steps, capacities: Sequence[int], prior: np.ndarray) -> np.ndarray:
    """Least recently used; what one step used together leaves by number, int64 [C]."""
    priority = np.empty(prior.size)
    priority[np.argsort(-prior, kind="stable")] = -1.0 - np.arange(prior.size)

    def touch(step: int, ids: np.ndarray) -> None:
        priority[ids] = step

    return _ranked(steps, capacities, priority, touch)


def frequency(steps: Steps, capacities: Sequence[int], prior: np.ndarray, decay: float) -> np.ndarray:
    """Decayed frequency as the runtime's cache counts it, int64 [C]."""
    policy = DecayedFrequency(prior[None], decay)

    def touch(step: int, ids: np.ndarray) -> None:
        policy.touch(0, ids)

    return _ranked(steps, capacities, policy.scores(0), touch)


def _ranked(
    steps: Steps, capacities: Sequence[int], priority: np.ndarray, touch: Callable[[int, np.ndarray], None]
) -> np.ndarray:
    """Hits of caches that hold the `capacity` ids of highest priority, the lower number first among equals.

    That is what demand fetching leaves when only a use raises a priority: who enters the best has just been used.
    """
    hits = np.zeros(len(capacities), np.int64)
    for step, ids in enumerate(steps):
        hits += _hits(priority, ids, capacities)
        touch(step, ids)
    return hits


def _hits(priority: np.ndarray, ids: np.ndarray, capacities: Sequence[int]) -> list[int]:
    size, own = priority.size, priority[ids]
    inner = [c for c in capacities if 0 < c < size]
    ordered = np.partition(priority, [size - c for c in inner]) if inner else priority
    found = []
    for capacity in capacities:
        if not 0 < capacity < size:
            found.append(ids.size if capacity else 0)
            continue
        last = ordered[size - capacity]  # the lowest priority that is still inside
        num = int(np.count_nonzero(own > last))
        equal = ids[own == last]
        if equal.size:
            places = capacity - int(np.count_nonzero(priority > last))
            num += int(np.count_nonzero(np.isin(equal, np.flatnonzero(priority == last)[:places])))
        found.append(num)
    return found


def belady(steps: Steps, num_ids: int, capacity: int) -> int:
    """Hits of the best that any policy can do: keep what is used again soonest (Belady 1966, with bypass).

    Only counts are kept: of what is in the cache, how many are used next at each step. Everything that a step uses is
    at hand afterwards, whether it was a hit or not, so which ones they were does not matter.
    """
    first, following = _next_uses(steps, num_ids)
    due = np.zeros(len(steps) + 1, np.int64)  # [step] residents whose next use it is
    np.add.at(due, first[first < len(steps)], 1)
    size, farthest = _drop_farthest(due, int(due.sum()), capacity, 0, len(steps))
    hits = 0
    for step, again in enumerate(following):
        hits += int(due[step])
        size += again.size - int(due[step])
        np.add.at(due, again, 1)
        if again.size:
            farthest = max(farthest, int(again.max()))
        size, farthest = _drop_farthest(due, size, capacity, step + 1, farthest)
    return hits


def _next_uses(steps: Steps, num_ids: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The step of each id's first use [num_ids] (num steps: never), and of the next one after each step's uses, those
    that never come again left out."""
    never = len(steps)
    upcoming = np.full(num_ids, never, np.int32)
    following: list[np.ndarray] = []
    for step in range(never - 1, -1, -1):
        again = upcoming[steps[step]]
        following.append(again[again < never])
        upcoming[steps[step]] = step
    return upcoming, following[::-1]


def _drop_farthest(due: np.ndarray, size: int, capacity: int, step: int, farthest: int) -> tuple[int, int]:
    """Shrinks the cache to its capacity; returns its size and the last step at which anything is due."""
    excess = size - capacity
    if excess <= 0:
        return size, farthest
    tail = due[step : farthest + 1][::-1].cumsum()
    whole = int(np.searchsorted(tail, excess))  # this many steps from the end go wholly, the next one in part
    last = farthest - whole
    due[last] = tail[whole] - excess
    due[last + 1 : farthest + 1] = 0
    return capacity, last
