"""The cache policy: its scores are what they claim, and it beats recency on a cyclic trace."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from cache.policy import DecayedFrequency, choose_swaps


def test_scores_are_decayed_counts() -> None:
    rng = np.random.default_rng(1)
    policy, decay = DecayedFrequency(np.zeros((1, 6)), decay=0.9), 0.9
    expected = np.zeros(6)
    for _ in range(500):  # long enough for the increments to be folded back
        used = np.flatnonzero(rng.random(6) < 0.4)
        policy.touch(0, used)
        expected = expected * decay
        expected[used] += 1
    found = policy.scores(0)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-9)


def test_the_prior_is_the_score_of_a_steady_share() -> None:
    policy = DecayedFrequency(np.array([[0.5, 0.25, 0.0]]))
    rng = np.random.default_rng(2)
    for _ in range(2000):
        policy.touch(0, np.flatnonzero(rng.random(3) < [0.5, 0.25, 0.0]))
    scores = policy.scores(0)
    assert scores[0] > scores[1] > scores[2]
    fresh = DecayedFrequency(np.array([[0.5, 0.25, 0.0]])).scores(0)
    assert fresh[0] == 2 * fresh[1] > fresh[2] == 0


def test_swaps_fill_free_places_then_take_strictly_worse_residents() -> None:
    admit, evict = choose_swaps(np.array([5.0, 1.0, 3.0, 9.0]), np.array([4.0, 2.0, 8.0]), free=1)
    assert admit.tolist() == [3, 0]  # 9 into the empty place, 5 for the resident of score 2; 3 is not above 4
    assert evict.tolist() == [1]


def test_equal_scores_move_nothing() -> None:
    admit, evict = choose_swaps(np.full(4, 2.0), np.full(4, 2.0), free=0)
    assert admit.size == evict.size == 0


def test_no_candidates_and_no_residents() -> None:
    assert choose_swaps(np.empty(0), np.array([1.0]), 0)[0].size == 0
    assert choose_swaps(np.array([1.0]), np.empty(0), 0)[0].size == 0


def test_swaps_equal_a_naive_exchange() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        candidates, residents = (
            rng.integers(0, 9, rng.integers(1, 9)).astype(float),
            rng.integers(0, 9, rng.integers(1, 9)).astype(float),
        )
        free = int(rng.integers(0, 4))
        admit, evict = choose_swaps(candidates, residents, free)
        kept = np.concatenate([np.delete(residents, evict), candidates[admit]])
        best = np.sort(np.concatenate([residents, candidates]))[::-1][: residents.size + free]
        assert kept.size <= residents.size + free
        assert kept.sum() == best.sum()


def trace(steps: int, neurons: int) -> list[np.ndarray]:
    """Skewed and a little sticky, as active sets are."""
    rng = np.random.default_rng(4)
    share = np.minimum(0.9, 0.6 / np.arange(1, neurons + 1) ** 0.6)
    rng.shuffle(share)
    state, out = rng.random(neurons) < share, []
    for _ in range(steps):
        state = np.where(rng.random(neurons) < 0.05, state, rng.random(neurons) < share)
        out.append(np.flatnonzero(state))
    return out


def hits_of_ours(sets: list[np.ndarray], neurons: int, size: int) -> int:
    policy, resident, hits = DecayedFrequency(np.zeros((1, neurons))), np.empty(0, np.int64), 0
    for used in sets:
        missed = np.setdiff1d(used, resident)
        hits += used.size - missed.size
        policy.touch(0, used)
        scores = policy.scores(0)
        admit, evict = choose_swaps(scores[missed], scores[resident], size - resident.size)
        resident = np.concatenate([np.delete(resident, evict), missed[admit]])
        assert resident.size <= size
    return hits


def hits_of_lru(sets: list[np.ndarray], size: int) -> int:
    resident: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for used in sets:
        for i in used.tolist():
            hits += i in resident
            resident[i] = None
            resident.move_to_end(i)
            if len(resident) > size:
                resident.popitem(last=False)
    return hits


def test_beats_lru_at_every_size() -> None:
    sets = trace(400, 300)
    for size in (15, 30, 60, 90, 150):
        assert hits_of_ours(sets, 300, size) > hits_of_lru(sets, size)
